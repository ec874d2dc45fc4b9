"""A generation request as routers and engines see it: token ids, never text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from kvrelay.core.errors import ContextLengthExceeded, InvalidRequest
from kvrelay.core.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The model drew an end-of-sequence or stop token (that token is delivered, as the last one)."""
    LENGTH = "length"
    """`max_tokens` were delivered, or the context is full."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: the chosen token's, and the likeliest ones', best first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What an engine is asked to continue.

    `token_ids` is the prompt followed by the output tokens that earlier attempts delivered already;
    `num_prompt_tokens` is where the prompt ends. The next token has index
    ``len(token_ids) - num_prompt_tokens`` among the outputs and position ``len(token_ids)``.
    `cache_salt` separates prefix caches: blocks match only under the same salt.

    Raises:
        InvalidRequest: the prompt is empty or a token id is negative.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: bytes = b""

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompt_tokens <= len(self.token_ids):
            raise InvalidRequest("prompt_token_ids must hold at least one token", field="prompt_token_ids")
        if min(self.token_ids) < 0:
            raise InvalidRequest("prompt_token_ids must not be negative", field="prompt_token_ids")

    @property
    def num_output_tokens(self) -> int:
        """Output tokens already part of `token_ids`."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Output tokens that `max_tokens` still allows."""
        return self.sampling.max_tokens - self.num_output_tokens

    @property
    def max_message_bytes(self) -> int:
        """At most so many bytes of a message are this request's, but for some hundred."""
        return len(self.token_ids) * 5 + self.sampling.max_extra_bytes

    def continued_with(self, output_token_ids: tuple[int, ...]) -> TokenRequest:
        """The continuation: the same request with more of its output known."""
        return replace(self, token_ids=self.token_ids + output_token_ids)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first tokens of a sequence, as far as one node is to take their KV from another. `cache_salt` is as
    in `TokenRequest`.

    Raises:
        InvalidRequest: it has no tokens, or a token id is negative.
    """

    token_ids: tuple[int, ...]
    cache_salt: bytes = b""

    def __post_init__(self) -> None:
        if not self.token_ids or min(self.token_ids) < 0:
            raise InvalidRequest("a prefix must hold at least one token, and no negative one")

    @property
    def max_message_bytes(self) -> int:
        """See `TokenRequest.max_message_bytes`."""
        return len(self.token_ids) * 5


def check_fits_model(request: TokenRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Refuse what the model cannot take, naming the field.

    Raises:
        InvalidRequest: a token id, of the prompt or of `logit_bias`, is not in the vocabulary.
        ContextLengthExceeded: the prompt leaves no room for a single output token.
    """
    if max(request.token_ids) >= vocab_size:
        raise InvalidRequest(
            f"prompt_token_ids holds {max(request.token_ids)}, the vocabulary ends at {vocab_size - 1}",
            field="prompt_token_ids",
        )
    biased_id = max((token_id for token_id, _ in request.sampling.logit_bias), default=0)
    if biased_id >= vocab_size:
        raise InvalidRequest(
            f"sampling.logit_bias names token {biased_id}, the vocabulary ends at {vocab_size - 1}",
            field="sampling.logit_bias",
        )
    if len(request.token_ids) >= max_model_len:
        raise ContextLengthExceeded(
            f"prompt_token_ids holds {len(request.token_ids)} tokens, the model's context is"
            f" {max_model_len} tokens including at least one of output",
            field="prompt_token_ids",
        )
