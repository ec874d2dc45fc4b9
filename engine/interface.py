"""The seam between a node and what computes: one protocol for every engine.

An engine is owned by one thread; only `kv` may be used from a second one (see `KVStore`). A sequence is
known by the key its node gives it. Lifecycles:

* engine alone:   `submit` -> tokens from every `step` until a finish reason; then it is freed by itself.
* prefill node:   `submit_prefill` -> `KVReady` for each computed range -> the first token; the KV is then
  held until `release`.
* decode node:    `reserve` -> (the KV arrives through `kv.scatter`) -> `start_decode` -> tokens until a
  finish reason; then it is freed by itself.
* prefix away:    `pin_prefix` -> (the KV is read through `kv.gather`) -> `release`.
* prefix here:    `reserve_prefix` -> (the KV arrives through `kv.scatter`) -> `keep_prefix`, and the prompt
  that is submitted next finds it in the prefix cache.
* any of them:    `release` frees whatever the key still holds; unknown keys are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from kvrelay.core.errors import EngineFailed, InvalidRequest, KVRelayError
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVFingerprint, KVStore
from kvrelay.core.kv_events import KVChanges
from kvrelay.core.request import FinishReason, Prefix, TokenLogprobs, TokenRequest

SequenceKey = NewType("SequenceKey", str)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is fixed once an engine has loaded. `model` is the name it is served under."""

    engine: str
    model: str
    fingerprint: KVFingerprint
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One new token of one sequence. `index` counts output tokens from 0, earlier attempts included."""

    key: SequenceKey
    index: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """A sequence that the engine gave up; it holds nothing any more.

    `field` names the request's field at fault; empty: the request is sound.
    """

    key: SequenceKey
    message: str
    field: str = ""

    @property
    def error(self) -> KVRelayError:
        """The caller's fault where a field is at fault, else the engine's."""
        return InvalidRequest(self.message, field=self.field) if self.field else EngineFailed(self.message)


@dataclass(frozen=True, slots=True)
class KVReady:
    """KV of `layers` x `tokens` of a prefill is final and may be gathered until `release(key)`."""

    key: SequenceKey
    block_table: Sequence[BlockId]
    layers: range
    tokens: range


class KVReadyListener(Protocol):
    """Called in the engine's thread, in the middle of a step: must return at once and never raise."""

    def __call__(self, ready: KVReady) -> None: ...


@dataclass(frozen=True, slots=True)
class StartedPrefill:
    """A `submit_prefill` sequence whose turn has come; `num_cached_tokens` were in the prefix cache."""

    key: SequenceKey
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one call of `step` produced.

    `started` began to be computed when the call did. `num_prefill_tokens` and `num_decode_tokens` belong to
    the batch that is whole now; `is_partial`: none is, the next call goes on with the one under way.
    """

    outputs: tuple[SequenceOutput, ...] = ()
    failures: tuple[SequenceFailure, ...] = ()
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    started: tuple[StartedPrefill, ...] = ()
    is_partial: bool = False


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a sequence on a decode node, or for a prefix.

    `block_table` covers all tokens, of a prefix that is pinned as many as the cache has. The first
    `num_cached_tokens` of them are in the prefix cache already (whole blocks, and of a sequence fewer than
    all tokens); only the rest needs to arrive.
    """

    key: SequenceKey
    block_table: tuple[BlockId, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is now. Cached blocks that nobody holds count as free.

    `num_held_blocks` are held by live sequences; ``num_held_blocks + num_cached_blocks + num_empty_blocks
    == num_blocks`` always, which is what a leak check asserts. Of the `prefix_hit_tokens`, `host_hit_tokens`
    came from the host tier, which uses `num_used_host_blocks` of `num_host_blocks`.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_reserved: int = 0
    num_held_blocks: int = 0
    num_cached_blocks: int = 0
    num_empty_blocks: int = 0
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    num_host_blocks: int = 0
    num_used_host_blocks: int = 0
    host_hit_tokens: int = 0

    @property
    def num_free_blocks(self) -> int:
        return self.num_cached_blocks + self.num_empty_blocks


class Engine(Protocol):
    """See the module's text for the lifecycles."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def kv(self) -> KVStore: ...

    def prepare_thread(self) -> None:
        """Called once in the thread that will call `step`, before: what libraries keep for each thread is
        set up now and not by the first request. Without it the engine works, only slower at first."""
        ...

    def set_kv_ready_listener(self, listener: KVReadyListener | None) -> None:
        """Who hears of KV computed by `submit_prefill` sequences. Ranges of one sequence come in order of
        tokens, and within a range of tokens in order of layers; a prefix-cache hit is reported first, as one
        range over all layers."""
        ...

    def submit(self, request: TokenRequest, key: SequenceKey) -> None:
        """Queue for prefill and decode here.

        Raises:
            Overloaded: `max_waiting` sequences wait already, or the pool could never hold this one.
            InvalidRequest, ContextLengthExceeded: the model cannot take it.
        """
        ...

    def submit_prefill(self, request: TokenRequest, key: SequenceKey) -> None:
        """Queue for prefill and one token only. Raises as `submit`."""
        ...

    def reserve(self, request: TokenRequest, key: SequenceKey) -> Reservation:
        """Take the blocks that the sequence's KV will arrive in, now.

        Raises:
            Overloaded: there is no room now.
            InvalidRequest, ContextLengthExceeded: the model cannot take it.
        """
        ...

    def start_decode(self, key: SequenceKey, first_token_id: int) -> None:
        """The reserved sequence's KV is complete: decode from `first_token_id`, which counts as delivered.

        Registers the sequence's full blocks in the prefix cache. Unknown keys are ignored.
        """
        ...

    def pin_prefix(self, prefix: Prefix, key: SequenceKey) -> Reservation:
        """Hold what the prefix cache has of `prefix`, of either tier, so that it may be gathered until
        `release(key)`: all of the reservation's tokens are cached ones, perhaps none.

        Raises:
            DuplicateRequest: the key is in use.
        """
        ...

    def reserve_prefix(self, prefix: Prefix, key: SequenceKey) -> Reservation:
        """Take the blocks that the KV of `prefix` will arrive in, now; it may all be cached already.

        Raises:
            Overloaded: there is no room now.
            DuplicateRequest: the key is in use.
        """
        ...

    def keep_prefix(self, key: SequenceKey, num_tokens: int) -> int:
        """The KV of a reserved prefix's first `num_tokens` tokens is here: its full blocks join the prefix
        cache, as if computed here, and nothing is held any more. Returns how many tokens they have; 0 where
        the KV is seen to be wrong, or the key is unknown."""
        ...

    def release(self, key: SequenceKey) -> None:
        """Stop the sequence if it runs and free all it holds, at once or, where the device is computing it,
        as soon as that is over. Unknown keys are ignored."""
        ...

    def has_work(self) -> bool:
        """Whether `step` would compute something."""
        ...

    def step(self) -> StepOutput:
        """Compute one batch, or a part of it: anything may be called in between. A sequence that fails is in
        `failures`; a fault of the engine itself raises."""
        ...

    def load(self) -> EngineLoad: ...

    def take_kv_changes(self) -> KVChanges | None:
        """What changed in the prefix cache since the last call; None: nothing. The first call, and one after
        more has changed than is remembered, gives all that the cache holds, after `cleared`. Until the first
        call nothing is remembered."""
        ...

    def close(self) -> None:
        """End what the engine has started, other processes above all. Nothing may be called after it."""
        ...
