"""The seam between the model and a device's way with single rows."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from kvrelay.engine.model.rope import apply_rope


class RowOperations(Protocol):
    """What a decoder layer does to each row by itself, between its matrix products."""

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Normalise the last dimension, ``weight``'s length; a new tensor."""
        ...

    def norm_heads(self, heads: Tensor, num_queries: int, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        """Normalise each of ``[num_rows, num_heads, head_dim]`` by itself, the first `num_queries` with
        `query_norm`, the others with `key_norm`; may mutate `heads` and return it."""
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up``, of ``[num_rows, 2 * size]``, gate first; may mutate it."""
        ...

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotary positions: see `apply_rope`; may mutate `heads` and return it."""
        ...


def norm_heads_apart(
    rows: RowOperations, heads: Tensor, num_queries: int, query_norm: Tensor, key_norm: Tensor
) -> Tensor:
    """`RowOperations.norm_heads` by two `rms_norm`; a new tensor."""
    queries, keys = heads.split_with_sizes([num_queries, heads.shape[1] - num_queries], 1)
    return torch.cat((rows.rms_norm(queries, query_norm), rows.rms_norm(keys, key_norm)), dim=1)


class TorchRows:
    """Out of torch's own operations."""

    def __init__(self, rms_norm_eps: float) -> None:
        self._rms_norm_eps = rms_norm_eps

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(rows, weight.shape, weight, self._rms_norm_eps)

    def norm_heads(self, heads: Tensor, num_queries: int, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        return norm_heads_apart(self, heads, num_queries, query_norm, key_norm)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        return F.silu(gate, inplace=True).mul_(up)

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        return apply_rope(heads, cosines, sines)
