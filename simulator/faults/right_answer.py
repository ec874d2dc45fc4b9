"""What the simulated model answers to a prompt: the one right output, however often it is continued."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.engine.sim.stamps import PrefixStamps, draw_token, stream_of


@lru_cache(maxsize=4)
def _stamps(max_tokens: int) -> PrefixStamps:
    return PrefixStamps(max_tokens, 1)


def right_tokens(request: TokenRequest, vocab_size: int, max_model_len: int, num_tokens: int) -> list[int]:
    """The first output tokens, ends of the output aside."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    stamps = _stamps(max_model_len)
    sampling = request.sampling
    seed = 0 if sampling.is_greedy else (sampling.seed or 0)
    stream = stream_of(int(stamps.prefix_sums(prompt)[-1]), seed)
    drawn = (draw_token(stream, len(prompt) + index, vocab_size) for index in range(num_tokens))
    return [token_id for token_id in drawn if token_id is not None]


def right_answer(
    request: TokenRequest, vocab_size: int, max_model_len: int
) -> tuple[Sequence[int], FinishReason]:
    """All output tokens, and why they end."""
    room = max_model_len - request.num_prompt_tokens
    num_tokens = min(request.sampling.max_tokens, room)
    tokens = right_tokens(request, vocab_size, max_model_len, num_tokens)
    for index, token_id in enumerate(tokens):
        if token_id in request.sampling.stop_token_ids:
            return tokens[: index + 1], FinishReason.STOP
    return tokens, FinishReason.LENGTH
