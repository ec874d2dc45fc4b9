"""What a caller gets for a request."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.core.request_report import RequestReport


@dataclass(slots=True)
class GenerationChunk:
    """The next part of an answer, made for its reader. `index` is the output index of its first token; each
    index comes once.

    `text` lags behind `token_ids` while a character is incomplete, so the last chunk may have text and no
    tokens. `logprobs` is empty, or has one entry per token.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    index: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer. Times are seconds as this client saw them; `report` has the router's.

    `ttft_s`: from the first use of the stream (before the prompt is tokenized) to the first token's arrival.
    `itl_s`: the gap before each further token, so one entry less than tokens; tokens that came in one
    message have gaps of 0. `num_retries` counts new attempts before the first token, `num_continuations`
    those after it. `router` is the address that served the end. `stop_text` is the stop string that the
    answer met; None: it ended otherwise.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: RequestReport
    logprobs: tuple[TokenLogprobs | None, ...]
    ttft_s: float
    itl_s: tuple[float, ...]
    total_s: float
    num_retries: int
    num_continuations: int
    router: str
    stop_text: str | None = None
