"""The model of fake nodes: what each request's right answer is."""

from __future__ import annotations

from kvrelay.core.request import FinishReason, TokenRequest

EOS = 7
CONTEXT_TOKENS = 48


def next_token(request: TokenRequest, output: list[int]) -> int:
    """The fake model: a function of everything before, and of the seed."""
    state = hash((request.token_ids[: request.num_prompt_tokens], tuple(output), request.sampling.seed))
    return state % 40


def finish_reason(request: TokenRequest, output: list[int]) -> FinishReason | None:
    if output[-1] in request.sampling.stop_token_ids:
        return FinishReason.STOP
    if output[-1] == EOS and not request.sampling.ignore_eos:
        return FinishReason.STOP
    is_full = request.num_prompt_tokens + len(output) >= CONTEXT_TOKENS
    return FinishReason.LENGTH if is_full or len(output) >= request.sampling.max_tokens else None


def right_answer(request: TokenRequest) -> tuple[list[int], FinishReason]:
    """All output tokens of the request, and why they end."""
    output = list(request.token_ids[request.num_prompt_tokens :])
    reason = finish_reason(request, output) if output else None
    while reason is None:
        output.append(next_token(request, output))
        reason = finish_reason(request, output)
    return output, reason
