"""Draws tokens on the device: greedy, or by temperature alone; what needs more is drawn by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kvrelay.engine.cuda.kernels import draw_chunk_kernel, draw_kernel, next_power_of_two
from kvrelay.engine.cuda.plain_draw import PreparedDraw, draw_key
from kvrelay.engine.sequence import Chunk

_CHUNK: Final = 4096
_TILE: Final = 1024


class CudaSampler:
    """`draw` is captured with a decode step; `kvrelay.engine.sampler.draw` is what it must agree with."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._num_chunks = -(-vocab_size // _CHUNK)
        shape = (max_rows, self._num_chunks)
        self._scores = torch.empty(shape, dtype=torch.float64, device=device)
        self._ids = torch.empty(shape, dtype=torch.int32, device=device)
        self._best = torch.empty(shape, dtype=torch.float32, device=device)
        self._device = device

    def prepare(self, chunks: Sequence[Chunk]) -> PreparedDraw:
        """Bring what the draw after these chunks needs to the device. All host memory is pinned: other
        copies would wait for what is queued. PyTorch reuses it only when no copy is under way any more."""
        num_rows, device = len(chunks), self._device
        keys = torch.tensor([draw_key(chunk) for chunk in chunks], pin_memory=True)
        temperatures = torch.tensor(
            [chunk.sequence.request.sampling.temperature for chunk in chunks],
            dtype=torch.float64,
            pin_memory=True,
        )
        return PreparedDraw(
            keys.to(device, non_blocking=True),
            temperatures.to(device, non_blocking=True),
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
            torch.empty(num_rows, dtype=torch.int64, pin_memory=True),
            torch.empty(num_rows, dtype=torch.float32, pin_memory=True),
        )

    def draw(
        self, logits: Tensor, keys: Tensor, temperatures: Tensor, token_ids: Tensor, best: Tensor
    ) -> None:
        """One token a row of `logits` ``[num_rows, vocab_size]`` into `token_ids` (int64), and the row's
        largest logit into `best` (float32). `keys` int64, `temperatures` float64, 0 for greedy."""
        num_rows = logits.shape[0]
        draw_chunk_kernel[(num_rows, self._num_chunks)](
            logits,
            keys,
            temperatures,
            self._scores,
            self._ids,
            self._best,
            self._vocab_size,
            self._num_chunks,
            CHUNK=_CHUNK,
            TILE=_TILE,
        )
        draw_kernel[(num_rows,)](
            self._scores,
            self._ids,
            self._best,
            token_ids,
            best,
            self._num_chunks,
            BLOCK=next_power_of_two(self._num_chunks),
        )
