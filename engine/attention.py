"""The seam between the model and a device's attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvrelay.core.ids import BlockId


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``[start, start + num_tokens)`` of one sequence, consecutive rows of a step's batch."""

    block_table: Sequence[BlockId]
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class Attention(Protocol):
    """One per engine, used for all layers."""

    def prepare_thread(self, max_step_tokens: int, max_model_len: int) -> None:
        """What the thread that computes needs once, before its first step; a step has at most so many
        tokens, a sequence so many."""
        ...

    def begin(self, spans: Sequence[Span], slots: Tensor) -> None:
        """Prepare a step. `slots` ``[num_rows]`` is where each row's KV goes; single tokens first."""
        ...

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store ``[num_rows, num_kv_heads, head_dim]`` each."""
        ...

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Causal attention of ``[num_rows, num_heads, head_dim]``; same shape."""
        ...
