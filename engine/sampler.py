"""Draws the next token of each sequence from its logits.

The order is that of `SamplingParams`: biases, penalties, the mask of allowed tokens, temperature, top-k,
top-p, min-p, one Gumbel-max draw.
A row's outcome depends on that row alone, so it is the same by itself and in any batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvrelay.core.request import TokenLogprobs
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.executor import DrawFailed, DrawnToken
from kvrelay.engine.noise import gumbel_noise, stream_key

_NUM_NUCLEUS_GUESS: Final = 512
"""Top-p looks at this many of the likeliest tokens before it sorts the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """One row. `token_ids` is everything before the drawn token: prompt, then outputs.

    `allowed` says what may be drawn, ``[vocab_size]`` bool, or why nothing can be; None: anything may.
    """

    sampling: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    allowed: Tensor | DrawFailed | None = None


def draw(logits: Tensor, requests: Sequence[DrawRequest]) -> list[DrawnToken | DrawFailed]:
    """One token a row of `logits` ``[len(requests), vocab_size]``, float32; may mutate it."""
    logprobs = [
        _log_softmax(row) if request.sampling.num_logprobs is not None else None
        for row, request in zip(logits, requests, strict=True)
    ]
    for row, request in zip(logits, requests, strict=True):
        _adjust(row, request)
    best, greedy_ids = logits.max(dim=1)
    best_logits, token_ids = best.tolist(), greedy_ids.tolist()
    results: list[DrawnToken | DrawFailed] = []
    for index, request in enumerate(requests):
        failed = _why_none(best_logits[index], request)
        if failed is not None:
            results.append(failed)
            continue
        token_id = token_ids[index]
        if not request.sampling.is_greedy:
            token_id = _draw_one(logits[index], best_logits[index], request)
        results.append(DrawnToken(token_id, _report(logprobs[index], token_id, request.sampling)))
    return results


def _why_none(best: float, request: DrawRequest) -> DrawFailed | None:
    """Why nothing can be drawn, if so, from a row whose largest logit is `best`."""
    if isinstance(request.allowed, DrawFailed):
        return request.allowed
    if best == -math.inf and request.allowed is not None:
        field = "sampling.min_tokens" if request.sampling.grammar is None else "sampling.grammar"
        return DrawFailed(f"{field} leaves no token to draw", field)
    return None if math.isfinite(best) else DrawFailed("the model's logits are not finite")


def _draw_one(row: Tensor, best: float, request: DrawRequest) -> int:
    sampling = request.sampling
    scaled = (row.double() - best) / sampling.temperature
    kept_ids = _kept_token_ids(scaled, sampling)
    key = stream_key(sampling.seed or 0, len(request.token_ids))
    scores = scaled[kept_ids] + gumbel_noise(key, kept_ids)
    return int(kept_ids[scores.argmax()])


def _kept_token_ids(scaled: Tensor, sampling: SamplingParams) -> Tensor:
    """Ids that top-k, top-p and min-p leave, at least the likeliest. `scaled` is at most 0 throughout."""
    num_kept = scaled.shape[0]
    if sampling.top_k:
        num_kept = min(sampling.top_k, num_kept)
    if sampling.top_p < 1.0:
        kept_ids = _nucleus(scaled, num_kept, sampling.top_p)
    elif num_kept < scaled.shape[0]:
        kept_ids = scaled.topk(num_kept).indices
    else:
        kept_ids = torch.arange(num_kept, device=scaled.device)
    if sampling.min_p > 0.0:
        kept_ids = kept_ids[scaled[kept_ids] >= math.log(sampling.min_p)]
    return kept_ids


def _nucleus(scaled: Tensor, num_kept: int, top_p: float) -> Tensor:
    """Fewest of the `num_kept` likeliest tokens whose share of their probability reaches `top_p`."""
    guess = min(num_kept, _NUM_NUCLEUS_GUESS)
    values, ids = scaled.topk(guess)
    total = float((values if num_kept == guess else _likeliest(scaled, num_kept)).exp().sum())
    before = values.exp().cumsum(0) / total
    if float(before[-1]) < top_p and guess < num_kept:
        values, ids = scaled.topk(num_kept)
        before = values.exp().cumsum(0) / total
    num_in = int((before < top_p).sum()) + 1
    return ids[:num_in]


def _likeliest(scaled: Tensor, num_kept: int) -> Tensor:
    return scaled if num_kept == scaled.shape[0] else scaled.topk(num_kept).values


def _adjust(row: Tensor, request: DrawRequest) -> None:
    sampling = request.sampling
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        row[torch.tensor(ids, device=row.device)] += torch.tensor(biases, dtype=row.dtype, device=row.device)
    if sampling.has_penalties:
        _penalise(row, request)
    if isinstance(request.allowed, Tensor):
        row.masked_fill_(~request.allowed.to(row.device), -math.inf)


def _penalise(row: Tensor, request: DrawRequest) -> None:
    sampling = request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(request.token_ids)), device=row.device)
        logits = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    counts = Counter(request.token_ids[request.num_prompt_tokens :])
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _log_softmax(row: Tensor) -> Tensor:
    return torch.log_softmax(row.double(), dim=0)


def _report(logprobs: Tensor | None, token_id: int, sampling: SamplingParams) -> TokenLogprobs | None:
    if logprobs is None:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if sampling.num_logprobs:
        values, ids = logprobs.topk(min(sampling.num_logprobs, logprobs.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token_id]), top)
