"""Copying rows of KV between scattered slots and a message: one Triton launch, or torch indexing.

Shapes, in machine words: `planes` ``[n, num_slots, words]`` with contiguous rows, and `message`
``[n, num_rows, words]``, whose rows may stand further apart than `words`, where a message has the heads of
other shards between them; n counts layers times 2. The message may be on another device, if it is a peer.
"""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch

_TILE_WORDS = 1024
_MAX_ROW_WORDS = 512
POINTER_ALIGNMENT = 16
"""Triton compiles kernels for pointers that are multiples of it apart from others."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Row r is that of token ``first_token + r``; `table` ``[num_blocks]`` int64, on the planes' device."""

    table: torch.Tensor
    block_size: int
    first_token: int

    def slots(self, num_rows: int) -> torch.Tensor:
        """``[num_rows]`` int64, all different."""
        stop = self.first_token + num_rows
        tokens = torch.arange(self.first_token, stop, device=self.table.device)
        return self.table[tokens // self.block_size] * self.block_size + tokens % self.block_size


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a kernel is compiled for: rows of `words`, `message_words` apart in a message."""

    words: int
    message_words: int
    word: torch.dtype
    block_size: int


class RawCopy(NamedTuple):
    """A copy by addresses, all multiples of `POINTER_ALIGNMENT`: of planes that lie one behind the other, and
    of the copying shard's part of a message."""

    planes: int
    message: int
    num_planes: int
    num_rows: int
    num_slots: int
    first_token: int
    is_gather: bool


class RowCopier(Protocol):
    """Both queue their work on the current stream, that of the planes' device."""

    @property
    def name(self) -> str: ...

    def gather(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        """``message[p, r] = planes[p, slot of row r]``."""
        ...

    def scatter(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        """``planes[p, slot of row r] = message[p, r]``."""
        ...


class IndexCopier:
    """Works everywhere; a few launches for each plane."""

    name = "index_select"

    def gather(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        slots = rows.slots(message.shape[1])
        for plane, part in zip(planes, message, strict=True):
            if part.is_contiguous() and part.device == plane.device:
                torch.index_select(plane, 0, slots, out=part)
            else:
                part.copy_(plane.index_select(0, slots))

    def scatter(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        slots = rows.slots(message.shape[1])
        with torch.inference_mode():  # the cache may have been made in it, and allows no other writes then
            for plane, part in zip(planes, message, strict=True):
                plane.index_copy_(0, slots, part.to(plane.device))


class TritonCopier:
    """One launch a message, at the speed of HBM.

    Many messages share one interpreter with the engine, so what a launch costs the CPU counts: `launch` gives
    a kernel that is compiled already bare addresses, which takes a fraction of what Triton takes to look it
    up, and torch to cut out views.
    """

    name = "triton"

    def __init__(self) -> None:
        self._kernel = _copy_rows_kernel()
        self._compiled: dict[tuple[object, ...], Any] = {}

    def launch(self, copy: RawCopy, shape: RowShape, table: torch.Tensor, stream: int) -> None:
        """Queue one copy on `stream` (a ``cudaStream_t``) of the table's device, which is the current one."""
        tile_words = min(1 << (shape.words - 1).bit_length(), _MAX_ROW_WORDS)
        tile_rows = _TILE_WORDS // tile_words
        grid = (-(-copy.num_rows // tile_rows), copy.num_planes, -(-shape.words // tile_words))
        constants = (
            shape.block_size,
            shape.words,
            shape.message_words,
            tile_rows,
            tile_words,
            copy.is_gather,
        )
        key = (table.device, shape, copy.is_gather)
        compiled = self._compiled.get(key)
        if compiled is None:
            words = torch.empty(64, dtype=shape.word, device=table.device)
            arguments = (words, words, table, copy.num_rows, copy.num_slots, copy.first_token, *constants)
            compiled = self._compiled[key] = self._kernel.warmup(*arguments, grid=grid)
        compiled[grid](
            copy.planes,
            copy.message,
            table,
            copy.num_rows,
            copy.num_slots,
            copy.first_token,
            *constants,
            stream=stream,
        )

    def gather(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        self._launch(planes, rows, message, is_gather=True)

    def scatter(self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor) -> None:
        self._launch(planes, rows, message, is_gather=False)

    def _launch(
        self, planes: torch.Tensor, rows: TokenRows, message: torch.Tensor, *, is_gather: bool
    ) -> None:
        num_planes, num_rows, row_words = message.shape
        plane_stride, message_row_words, word_stride = message.stride()
        assert (plane_stride, word_stride) == (num_rows * message_row_words, 1)
        tile_words = min(1 << (row_words - 1).bit_length(), _MAX_ROW_WORDS)
        tile_rows = _TILE_WORDS // tile_words
        grid = (-(-num_rows // tile_rows), num_planes, -(-row_words // tile_words))
        self._kernel[grid](
            planes,
            message,
            rows.table,
            num_rows,
            planes.shape[1],
            rows.first_token,
            BLOCK_SIZE=rows.block_size,
            ROW_WORDS=row_words,
            MESSAGE_ROW_WORDS=message_row_words,
            TILE_ROWS=tile_rows,
            TILE_WORDS=tile_words,
            IS_GATHER=is_gather,
        )


def choose_copier(device: torch.device, shape: RowShape) -> RowCopier:
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
        with torch.cuda.device(device):
            _try_out(copier, device, shape)
    except (TritonError, RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        _log.warning("KV is copied by torch's indexing, several times slower: Triton fails here: %s", error)
        return IndexCopier()
    return copier


def _try_out(copier: RowCopier, device: torch.device, shape: RowShape) -> None:
    num_slots = 5 * shape.block_size
    planes = torch.arange(4 * num_slots * shape.words, device=device).to(shape.word)
    planes = planes.view(4, num_slots, shape.words)
    rows = TokenRows(torch.tensor([4, 1, 3], device=device), shape.block_size, shape.block_size // 2)
    num_rows = 3 * shape.block_size - rows.first_token
    whole = torch.zeros(4, num_rows, shape.message_words, dtype=shape.word, device=device)
    message, slots = whole[:, :, : shape.words], rows.slots(num_rows)
    copier.gather(planes, rows, message)
    assert torch.equal(message, planes[:, slots]), "gather copied wrong rows"
    assert not whole[:, :, shape.words :].any(), "gather wrote outside of its rows"
    copied, expected = torch.zeros_like(planes), torch.zeros_like(planes)
    copier.scatter(copied, rows, message)
    expected[:, slots] = planes[:, slots]
    assert torch.equal(copied, expected), "scatter copied wrong rows"


@lru_cache(maxsize=1)
def _copy_rows_kernel() -> Any:
    from kvrelay.engine.cuda.copy_rows import copy_rows

    return copy_rows
