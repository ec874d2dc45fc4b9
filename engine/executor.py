"""The seam between the paged engine and what computes its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVStore
from kvrelay.core.request import TokenLogprobs, TokenRequest
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.sequence import Chunk


class DrawnToken(NamedTuple):
    """The next token of one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class DrawFailed:
    """The sequence can't go on. `field` as in `SequenceFailure`."""

    message: str
    field: str = ""


LayerDone = Callable[[int], None]
"""Called with each layer's index, first to last, when its KV of all of the step's tokens is in the cache."""


class Executor(Protocol):
    """What computes a planned step."""

    @property
    def kv(self) -> KVStore: ...

    def prepare_thread(self) -> None:
        """See `kvrelay.engine.interface.Engine`."""
        ...

    def prepare(self, request: TokenRequest) -> object:
        """A new sequence's `executor_state`.

        Raises:
            InvalidRequest: it can't serve this request; `field` says why.
        """
        ...

    def execute(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        """Compute the chunks' KV and draw the next token of each chunk that `samples`, in their order."""
        ...

    def move_blocks(self, copies: Sequence[BlockCopy], *, before_receive: bool) -> None:
        """Copy blocks between device and host. The copies take effect in their order, after what was executed
        or launched before them, and before what is executed or launched later. `before_receive`: a transfer
        is about to be told of blocks, so that its `kv.scatter` has to come after these copies and all earlier
        ones too."""
        ...

    def reveal_restored(self) -> None:
        """What was copied to the device is about to be reported, as a part of the step whose turn has come:
        no step is under way before it; or a transfer that reads it begins. Each `kv.gather` of it from now on
        comes after the copies."""
        ...

    def check_received(self, token_ids: Sequence[int], block_table: Sequence[BlockId]) -> str | None:
        """What is wrong with the KV of these tokens that was received in these blocks; None: nothing that
        shows."""
        ...


class Launched(Protocol):
    """A step under way."""

    @property
    def chunks(self) -> Sequence[Chunk]: ...

    def has_time(self) -> bool:
        """Whether the device is thought to be busy with it for as long as the host needs to launch the next:
        else its tokens would wait for the launch."""
        ...

    def advance(self) -> bool:
        """Wait for a part of it, and report what KV is there. True: `results` is next; False: call again."""
        ...

    def results(self) -> Sequence[DrawnToken | DrawFailed]:
        """Wait until it is computed, and for the tokens drawn, one a chunk that `samples`."""
        ...


@runtime_checkable
class AheadExecutor(Executor, Protocol):
    """An executor that can begin a step before the tokens of the one before are known."""

    def can_launch(self, chunks: Sequence[Chunk]) -> bool:
        """Whether `launch` can take this step; if it decodes, those that follow of the same sequences too."""
        ...

    def launch(self, chunks: Sequence[Chunk], layer_done: LayerDone | None) -> Launched:
        """Begin a step that decodes or prefills alone. A decode whose token is not among its sequence's yet
        takes the one that the step launched last draws. At most two are under way, and the first one's
        progress is reported meanwhile; this one's only behind the first one's `results`."""
        ...
