"""What a caller asks for, checked before anything is sent; and its prompt as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import Final, Protocol
from uuid import uuid4

from kvrelay.client.detokenizer import Detokenizer
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.codec.bounds import MAX_CACHE_SALT_BYTES, MAX_TOKEN_ID, length, seconds, text
from kvrelay.codec.generate import MAX_TIMEOUT_S
from kvrelay.core.client_types import MAX_MODEL_CHARS, MAX_REQUEST_ID_CHARS, GenerateCall
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.errors import ContextLengthExceeded, InvalidRequest
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import MAX_SEED, SamplingParams

MAX_PROMPT_TOKENS: Final = 500_000
"""Keeps one request's message under 4 MiB, which any gRPC server takes: a larger one would end the session
of all others."""
MAX_PROMPT_CHARS: Final = 16 << 20
DEFAULT_SAMPLING: Final = SamplingParams()
_LONG_TEXT_CHARS: Final = 16_384
"""Tokenizing more than this takes milliseconds, so it is done off the event loop."""


@dataclass(frozen=True, slots=True)
class GenerationAsk:
    """A checked request of a caller. Exactly one of `prompt` and `messages` is given.

    `chat` wraps a text prompt as one user message; without it text is tokenized as it is. `decode_text`
    False leaves every `text` empty, and spares a token-id prompt the model's tokenizer.

    Raises:
        InvalidRequest: a field can't be served; `field` names it.
        ContextLengthExceeded: the prompt is longer than any model takes.
    """

    prompt: str | tuple[int, ...] | None
    messages: tuple[Mapping[str, str], ...] | None = None
    chat: bool = False
    model: str = ""
    sampling: SamplingParams = DEFAULT_SAMPLING
    timeout_s: float | None = None
    request_id: str = ""
    cache_salt: bytes = b""
    decode_text: bool = True

    def __post_init__(self) -> None:
        self._check_names()
        self._check_timeout()
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequest(f"sampling must be SamplingParams, got {self.sampling!r}", field="sampling")
        self._check_prompt()

    def _check_names(self) -> None:
        for field, most in (("model", MAX_MODEL_CHARS), ("request_id", MAX_REQUEST_ID_CHARS)):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise InvalidRequest(f"{field} must be a string, got {value!r}", field=field)
            text(value, field, most)
        if not isinstance(self.cache_salt, bytes):
            raise InvalidRequest("cache_salt must be bytes", field="cache_salt")
        length(len(self.cache_salt), "cache_salt", MAX_CACHE_SALT_BYTES)

    def _check_prompt(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", field="prompt")
        if self.messages is not None:
            _check_messages(self.messages)
        elif not self.prompt:
            raise InvalidRequest("prompt must not be empty", field="prompt")
        elif isinstance(self.prompt, str):
            check_text(self.prompt, "prompt")
        else:
            check_token_ids(self.prompt, "prompt")
        if self.chat and not isinstance(self.prompt, str):
            raise InvalidRequest("chat needs a text prompt", field="chat")

    def _check_timeout(self) -> None:
        if self.timeout_s is None:
            return
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, int | float):
            raise InvalidRequest(f"timeout_s must be a number, got {self.timeout_s!r}", field="timeout_s")
        if seconds(self.timeout_s, "timeout_s", is_positive=True) > MAX_TIMEOUT_S:
            raise InvalidRequest(
                f"timeout_s must be at most {MAX_TIMEOUT_S:g}, got {self.timeout_s:g}", field="timeout_s"
            )


def make_ask(
    prompt: str | Sequence[int] | None,
    messages: Sequence[Mapping[str, str]] | None,
    *,
    chat: bool,
    model: str,
    sampling: SamplingParams,
    timeout_s: float | None,
    request_id: str,
    cache_salt: bytes,
    decode_text: bool,
) -> GenerationAsk:
    """Freeze what a caller gave, with a request id where it gave none. Raises as `GenerationAsk` does."""
    for field, value in (("prompt", prompt), ("messages", messages)):
        if value is not None and (not isinstance(value, Sequence) or isinstance(value, bytes)):
            raise InvalidRequest(f"{field} must be a sequence, got {value!r}", field=field)
    return GenerationAsk(
        prompt=prompt if prompt is None or isinstance(prompt, str) else tuple(prompt),
        messages=None if messages is None else tuple(messages),
        chat=chat,
        model=model,
        sampling=sampling,
        timeout_s=timeout_s,
        request_id=request_id or uuid4().hex,
        cache_salt=cache_salt,
        decode_text=decode_text,
    )


class ModelSource(Protocol):
    """Where models and their tokenizers come from."""

    async def find(self, model: str) -> ModelInfo:
        """The model of that name; empty: the only one."""
        ...

    async def tokenizer_of(self, model: ModelInfo) -> ModelTokenizer | None:
        """Its tokenizer; None where no node has given one."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """What goes to a router, and what turns its answer into text (None: nothing does)."""

    call: GenerateCall
    detokenizer: Detokenizer | None


async def prepare_call(ask: GenerationAsk, models: ModelSource) -> PreparedCall:
    """Tokenize the prompt and fix the seed, so that a continuation through another router samples alike.

    Raises:
        InvalidRequest: text was given and the model has no tokenizer, or no chat template.
        ContextLengthExceeded: the prompt has too many tokens.
        KVRelayError: the model or its tokenizer could not be had.
    """
    tokenizer: ModelTokenizer | None = None
    hidden_ids: tuple[int, ...] = ask.sampling.stop_token_ids
    model = ask.model
    if ask.decode_text or not isinstance(ask.prompt, tuple):
        info = await models.find(ask.model)
        tokenizer = await models.tokenizer_of(info)
        model, hidden_ids = info.name, hidden_ids + info.eos_token_ids
    token_ids = await _prompt_token_ids(ask, tokenizer)
    request = TokenRequest(token_ids, len(token_ids), _with_seed(ask.sampling), ask.cache_salt)
    detokenizer = tokenizer.detokenizer(hidden_ids=hidden_ids) if tokenizer and ask.decode_text else None
    return PreparedCall(GenerateCall(ask.request_id, model, request, ask.timeout_s), detokenizer)


async def _prompt_token_ids(ask: GenerationAsk, tokenizer: ModelTokenizer | None) -> tuple[int, ...]:
    if isinstance(ask.prompt, tuple):
        return ask.prompt
    field = "messages" if ask.prompt is None else "prompt"
    if tokenizer is None:
        raise InvalidRequest(f"{field} is text, but the model has no tokenizer; send token ids", field=field)
    num_chars = len(ask.prompt or "") + sum(len(message["content"]) for message in ask.messages or ())
    if num_chars > _LONG_TEXT_CHARS:
        token_ids = await asyncio.to_thread(_encode, ask, tokenizer)
    else:
        token_ids = _encode(ask, tokenizer)
    if not token_ids:
        raise InvalidRequest(f"{field} has no tokens", field=field)
    if len(token_ids) > MAX_PROMPT_TOKENS:
        raise _too_long(len(token_ids), field)
    return token_ids


def _encode(ask: GenerationAsk, tokenizer: ModelTokenizer) -> tuple[int, ...]:
    if ask.messages is not None:
        return tokenizer.encode_chat(ask.messages)
    assert isinstance(ask.prompt, str)
    if ask.chat:
        return tokenizer.encode_chat([{"role": "user", "content": ask.prompt}])
    return tokenizer.encode(ask.prompt)


def _with_seed(sampling: SamplingParams) -> SamplingParams:
    if sampling.is_greedy or sampling.seed is not None:
        return sampling
    return replace(sampling, seed=SystemRandom().randint(0, MAX_SEED))


def check_text(text: object, field: str) -> None:
    """A string of a bounded length that UTF-8 can hold. Raises, naming `field`."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a string, got {text!r}", field=field)
    if len(text) > MAX_PROMPT_CHARS:
        raise ContextLengthExceeded(
            f"{field} has {len(text)} characters, at most {MAX_PROMPT_CHARS}", field=field
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field} is not valid Unicode: {error}", field=field) from error


def check_token_ids(token_ids: Sequence[int], field: str) -> None:
    """A bounded number of integers that may be token ids. Raises, naming `field`."""
    if len(token_ids) > MAX_PROMPT_TOKENS:
        raise _too_long(len(token_ids), field)
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= MAX_TOKEN_ID:
            raise InvalidRequest(
                f"{field} must hold token ids from 0 to {MAX_TOKEN_ID}, got {token_id!r}", field=field
            )


def _check_messages(messages: tuple[Mapping[str, str], ...]) -> None:
    if not messages:
        raise InvalidRequest("messages must hold at least one message", field="messages")
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{field} must be a mapping with role and content", field=field)
        for key in ("role", "content"):
            check_text(message.get(key), f"{field}.{key}")


def _too_long(num_tokens: int, field: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(f"{field} has {num_tokens} tokens, at most {MAX_PROMPT_TOKENS}", field=field)
