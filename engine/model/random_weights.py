"""Weights drawn at random, for the speed of a shape whose real weights are not here."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_STANDARD_DEVIATION: Final = 0.02


class RandomWeights:
    """In place of a `WeightFolder`: every tensor exists, made on `device`. Norms are 1."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __contains__(self, name: str) -> bool:
        return not name.endswith(".bias")

    def read_stacked(self, names: list[str], shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """See `WeightFolder.read_stacked`."""
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        stacked = torch.empty(shape, dtype=dtype, device=self._device)
        if len(shape) == 1:
            return stacked.fill_(1.0)
        return stacked.normal_(0.0, _STANDARD_DEVIATION, generator=self._generator)
