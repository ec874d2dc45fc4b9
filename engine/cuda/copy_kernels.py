"""Copying rows of KV between scattered slots and a contiguous message: one Triton launch, or torch indexing.

Shapes, in machine words: `planes` ``[n, num_slots, words]``, `slots` ``[num_rows]`` int64, all different,
`message` ``[n, num_rows, words]``; n counts layers times 2. Rows of a plane are contiguous.
"""

from __future__ import annotations

import logging
import subprocess
from functools import lru_cache
from typing import Any, Protocol

import torch

_TILE_WORDS = 1024
_MAX_ROW_WORDS = 512

_log = logging.getLogger(__name__)


class RowCopier(Protocol):
    """Both queue their work on the current stream."""

    @property
    def name(self) -> str: ...

    def gather(self, planes: torch.Tensor, slots: torch.Tensor, message: torch.Tensor) -> None:
        """``message[p, r] = planes[p, slots[r]]``."""
        ...

    def scatter(self, planes: torch.Tensor, slots: torch.Tensor, message: torch.Tensor) -> None:
        """``planes[p, slots[r]] = message[p, r]``."""
        ...


class IndexCopier:
    """Works everywhere; one launch for each plane."""

    name = "index_select"

    def gather(self, planes: torch.Tensor, slots: torch.Tensor, message: torch.Tensor) -> None:
        for plane, part in zip(planes, message, strict=True):
            torch.index_select(plane, 0, slots, out=part)

    def scatter(self, planes: torch.Tensor, slots: torch.Tensor, message: torch.Tensor) -> None:
        with torch.inference_mode():  # the cache may have been made in it, and allows no other writes then
            for plane, part in zip(planes, message, strict=True):
                plane.index_copy_(0, slots, part)


class TritonCopier:
    """One launch a message, at the speed of HBM."""

    name = "triton"

    def __init__(self) -> None:
        self._kernel = _copy_rows_kernel()

    def gather(self, planes: torch.Tensor, slots: torch.Tensor, message: torch.Tensor) -> None:
        self._launch(planes, slots, message, is_gather=True)

    def scatter(self, planes: torch.Tensor, slots: torch.Tensor, message: torch.Tensor) -> None:
        self._launch(planes, slots, message, is_gather=False)

    def _launch(
        self, planes: torch.Tensor, slots: torch.Tensor, message: torch.Tensor, *, is_gather: bool
    ) -> None:
        num_planes, num_rows, row_words = message.shape
        tile_words = min(1 << (row_words - 1).bit_length(), _MAX_ROW_WORDS)
        tile_rows = _TILE_WORDS // tile_words
        grid = (-(-num_rows // tile_rows), num_planes, -(-row_words // tile_words))
        self._kernel[grid](
            planes,
            message,
            slots,
            num_rows,
            planes.shape[1],
            ROW_WORDS=row_words,
            TILE_ROWS=tile_rows,
            TILE_WORDS=tile_words,
            IS_GATHER=is_gather,
        )


def choose_copier(device: torch.device, row_words: int, word: torch.dtype) -> RowCopier:
    """Triton's where it compiles for such rows and copies them right, else torch's."""
    if device.type != "cuda":
        return IndexCopier()
    try:
        from triton.errors import TritonError
    except ImportError as error:
        _log.warning("KV is copied by torch's indexing, several times slower: no Triton: %s", error)
        return IndexCopier()
    try:
        copier = TritonCopier()
        _try_out(copier, device, row_words, word)
    except (TritonError, RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        _log.warning("KV is copied by torch's indexing, several times slower: Triton fails here: %s", error)
        return IndexCopier()
    return copier


def _try_out(copier: RowCopier, device: torch.device, row_words: int, word: torch.dtype) -> None:
    planes = torch.arange(4 * 40 * row_words, device=device).to(word).view(4, 40, row_words)
    slots = torch.arange(1, 40, 2, device=device).flip(0)
    message = torch.zeros(4, len(slots), row_words, dtype=word, device=device)
    copier.gather(planes, slots, message)
    assert torch.equal(message, planes[:, slots]), "gather copied wrong rows"
    copied, expected = torch.zeros_like(planes), torch.zeros_like(planes)
    copier.scatter(copied, slots, message)
    expected[:, slots] = planes[:, slots]
    assert torch.equal(copied, expected), "scatter copied wrong rows"


@lru_cache(maxsize=1)
def _copy_rows_kernel() -> Any:
    from kvrelay.engine.cuda.copy_rows import copy_rows

    return copy_rows
