"""What the device draws by itself: which sequences' tokens, from what, and how they come to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.executor import DrawFailed, DrawnToken
from kvrelay.engine.noise import stream_key
from kvrelay.engine.sequence import Chunk, LiveSequence

NOT_FINITE: Final = "the model's logits are not finite"


@dataclass(frozen=True, slots=True)
class PreparedDraw:
    """Inputs and outputs of one draw on the device, and pinned memory for the outputs."""

    keys: Tensor
    temperatures: Tensor
    token_ids: Tensor
    best: Tensor
    host_token_ids: Tensor
    host_best: Tensor

    def fetch(self) -> None:
        """Queue the copies to the host behind the draw."""
        self.host_token_ids.copy_(self.token_ids, non_blocking=True)
        self.host_best.copy_(self.best, non_blocking=True)

    def read(self) -> list[DrawnToken | DrawFailed]:
        """What was drawn; the copies are done."""
        return drawn_tokens(self.host_token_ids.tolist(), self.host_best.tolist())


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
