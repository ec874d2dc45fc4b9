"""The seam between the model and a device's way with single rows."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from kvrelay.engine.model.rope import apply_rope


class RowOperations(Protocol):
    """What a decoder layer does to each row by itself, between its matrix products."""

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Normalise the last dimension, ``weight``'s length; a new tensor."""
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up``, of ``[num_rows, 2 * size]``, gate first; may mutate it."""
        ...

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotary positions: see `apply_rope`; may mutate `heads` and return it."""
        ...


class TorchRows:
    """Out of torch's own operations."""

    def __init__(self, rms_norm_eps: float) -> None:
        self._rms_norm_eps = rms_norm_eps

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(rows, weight.shape, weight, self._rms_norm_eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        return F.silu(gate, inplace=True).mul_(up)

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        return apply_rope(heads, cosines, sines)
