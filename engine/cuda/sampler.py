"""Draws tokens on the device: greedy, or by temperature alone; what needs more is drawn by the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.cuda.kernels import draw_chunk_kernel, draw_kernel, next_power_of_two
from kvrelay.engine.executor import DrawFailed, DrawnToken
from kvrelay.engine.noise import stream_key
from kvrelay.engine.sequence import Chunk, LiveSequence

NOT_FINITE: Final = "the model's logits are not finite"
_CHUNK: Final = 4096
_TILE: Final = 1024


@dataclass(frozen=True, slots=True)
class PreparedDraw:
    """Inputs and outputs of one `CudaSampler.draw`, all on the device."""

    keys: Tensor
    temperatures: Tensor
    token_ids: Tensor
    best: Tensor

    def wait(self) -> list[DrawnToken | DrawFailed]:
        """What was drawn, once it is."""
        return drawn_tokens(self.token_ids.tolist(), self.best.tolist())


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
        """Bring what the draw after these chunks needs to the device: before the logits are queued, because
        a copy from pageable memory waits for all that is."""
        sampling = [chunk.sequence.request.sampling for chunk in chunks]
        device = self._device
        return PreparedDraw(
            torch.tensor([draw_key(chunk) for chunk in chunks], device=device),
            torch.tensor([each.temperature for each in sampling], dtype=torch.float64, device=device),
            torch.empty(len(chunks), dtype=torch.int64, device=device),
            torch.empty(len(chunks), dtype=torch.float32, device=device),
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


def draw_key(chunk: Chunk) -> int:
    """What the noise of the token after the chunk is a function of; 0 where there is none."""
    sampling = chunk.sequence.request.sampling
    return 0 if sampling.is_greedy else stream_key(sampling.seed or 0, chunk.end)


def drawn_tokens(token_ids: Sequence[int], best: Sequence[float]) -> list[DrawnToken | DrawFailed]:
    """Rows whose largest logit is not finite have failed."""
    return [
        DrawnToken(token_id) if math.isfinite(highest) else DrawFailed(NOT_FINITE)
        for token_id, highest in zip(token_ids, best, strict=True)
    ]


def is_plain(sequence: LiveSequence) -> bool:
    """Whether `CudaSampler` can draw the sequence's next token, and every later one."""
    sampling: SamplingParams = sequence.request.sampling
    if sampling.num_logprobs is not None or sampling.logit_bias or sampling.has_penalties:
        return False
    if sampling.grammar is not None or sequence.num_output_tokens < sampling.min_tokens:
        return False
    return sampling.is_greedy or (not sampling.top_k and sampling.top_p >= 1.0 and sampling.min_p <= 0.0)
