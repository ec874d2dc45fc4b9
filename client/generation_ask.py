"""What a caller asks for, checked before anything is sent; and its prompt as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import Any, Final, Protocol, TypedDict
from uuid import uuid4

from kvrelay.client.chat_template import check_template_inputs
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.client.output_text import OutputText
from kvrelay.client.stop_strings import StopStrings
from kvrelay.client.tokenizing import Tokenizing
from kvrelay.codec.bounds import MAX_CACHE_SALT_BYTES, MAX_TOKEN_ID, length, seconds, text
from kvrelay.codec.service_terms import MAX_TIMEOUT_S
from kvrelay.core.client_types import MAX_MODEL_CHARS, MAX_REQUEST_ID_CHARS, GenerateCall
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.errors import ContextLengthExceeded, InvalidRequest
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import MAX_SEED, SamplingParams
from kvrelay.core.service_terms import MAX_TENANT_CHARS, Priority, ServiceTerms

MAX_PROMPT_TOKENS: Final = 500_000
"""Keeps one request's message under 4 MiB, which any gRPC server takes: a larger one would end the session
of all others."""
MAX_PROMPT_CHARS: Final = 16 << 20
DEFAULT_SAMPLING: Final = SamplingParams()
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_TOOLS: Final = 1024


@dataclass(frozen=True, slots=True)
class GenerationAsk:
    """A checked request of a caller. Exactly one of `prompt` and `messages` is given.

    `chat` wraps a text prompt as one user message; without it text is tokenized as it is. `decode_text`
    False leaves every `text` empty, and spares a token-id prompt the model's tokenizer. The answer ends
    before the first of the texts in `stop`, or with `include_stop` after it. `tools`, `template_variables`
    and `add_generation_prompt` are for the model's chat template. `skip_special_tokens` False shows special
    tokens in the answer's text, but for the one that ends it. `priority`, `tenant` and `ttft_timeout_s`: see
    `ServiceTerms`.

    Raises:
        InvalidRequest: a field can't be served; `field` names it.
        ContextLengthExceeded: the prompt is longer than any model takes.
    """

    prompt: str | tuple[int, ...] | None
    messages: tuple[Mapping[str, object], ...] | None = None
    chat: bool = False
    model: str = ""
    sampling: SamplingParams = DEFAULT_SAMPLING
    timeout_s: float | None = None
    request_id: str = ""
    cache_salt: bytes = b""
    decode_text: bool = True
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    tools: tuple[Mapping[str, object], ...] | None = None
    template_variables: Mapping[str, object] | None = None
    add_generation_prompt: bool = True
    skip_special_tokens: bool = True
    priority: str = Priority.NORMAL
    tenant: str = ""
    ttft_timeout_s: float | None = None

    def __post_init__(self) -> None:
        self._check_names()
        for field in ("timeout_s", "ttft_timeout_s"):
            check_timeout(getattr(self, field), field)
        if self.priority not in tuple(Priority):
            known = ", ".join(Priority)
            raise InvalidRequest(f"priority must be one of {known}, got {self.priority!r}", field="priority")
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequest(f"sampling must be SamplingParams, got {self.sampling!r}", field="sampling")
        self._check_prompt()
        check_template_inputs(self.tools, self.template_variables, max_tools=MAX_TOOLS)
        self._check_stop()

    def _check_names(self) -> None:
        bounds = {"model": MAX_MODEL_CHARS, "request_id": MAX_REQUEST_ID_CHARS, "tenant": MAX_TENANT_CHARS}
        for field, most in bounds.items():
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
            check_messages(self.messages)
        elif not self.prompt:
            raise InvalidRequest("prompt must not be empty", field="prompt")
        elif isinstance(self.prompt, str):
            check_text(self.prompt, "prompt")
        else:
            check_token_ids(self.prompt, "prompt")
        if self.chat and not isinstance(self.prompt, str):
            raise InvalidRequest("chat needs a text prompt", field="chat")

    def _check_stop(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(f"stop has {len(self.stop)} strings, at most {MAX_STOPS}", field="stop")
        for index, stop in enumerate(self.stop):
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise InvalidRequest(
                    f"stop[{index}] must be a string of 1 to {MAX_STOP_CHARS} characters",
                    field=f"stop[{index}]",
                )
        if self.stop and not self.decode_text:
            raise InvalidRequest("stop needs the answer's text: decode_text must be true", field="stop")

    @property
    def terms(self) -> ServiceTerms:
        """As they go to a router."""
        return ServiceTerms(Priority(self.priority), self.tenant, self.ttft_timeout_s)


class AskOptions(TypedDict, total=False):
    """What may be given beside a prompt; see `AsyncClient.generate`."""

    messages: Sequence[Mapping[str, object]] | None
    chat: bool
    model: str
    sampling: SamplingParams
    timeout_s: float | None
    request_id: str
    cache_salt: bytes
    decode_text: bool
    stop: Sequence[str]
    include_stop: bool
    tools: Sequence[Mapping[str, object]] | None
    template_variables: Mapping[str, object] | None
    add_generation_prompt: bool
    skip_special_tokens: bool
    priority: str
    tenant: str
    ttft_timeout_s: float | None


def make_ask(prompt: str | Sequence[int] | None, options: AskOptions) -> GenerationAsk:
    """Freeze what a caller gave, with a request id where it gave none. Raises as `GenerationAsk` does."""
    lists: dict[str, Any] = {"prompt": prompt}
    lists |= {name: options[name] for name in ("messages", "stop", "tools") if name in options}
    for field, value in lists.items():
        if value is not None and (not isinstance(value, Sequence) or isinstance(value, bytes)):
            raise InvalidRequest(f"{field} must be a sequence, got {value!r}", field=field)
        if value is not None and (field != "prompt" or not isinstance(value, str)):
            lists[field] = tuple(value)
    if isinstance(options.get("stop"), str):
        raise InvalidRequest("stop must be a sequence of strings", field="stop")
    given: dict[str, Any] = {**options, **lists}
    given["request_id"] = given.get("request_id") or uuid4().hex
    return GenerationAsk(**given)


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
    """What goes to a router, and what turns its answer into text."""

    call: GenerateCall
    output_text: OutputText


async def prepare_call(ask: GenerationAsk, models: ModelSource, tokenizing: Tokenizing) -> PreparedCall:
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
    token_ids = await _prompt_token_ids(ask, tokenizer, tokenizing)
    request = TokenRequest(token_ids, len(token_ids), _with_seed(ask.sampling), ask.cache_salt)
    if ask.stop and tokenizer is None:
        raise InvalidRequest("stop can't be found in text: the model has no tokenizer", field="stop")
    detokenizer = None
    if tokenizer and ask.decode_text:
        if ask.sampling.ignore_eos and not ask.skip_special_tokens:
            hidden_ids = ask.sampling.stop_token_ids  # an end-of-sequence token ends nothing then
        detokenizer = tokenizer.detokenizer(
            hidden_ids=hidden_ids, skip_special_tokens=ask.skip_special_tokens
        )
    stops = None
    if ask.stop:
        stops = StopStrings(ask.stop, include_stop=ask.include_stop, min_tokens=ask.sampling.min_tokens)
    call = GenerateCall(ask.request_id, model, request, ask.timeout_s, ask.terms)
    return PreparedCall(call, OutputText(detokenizer, stops))


async def _prompt_token_ids(
    ask: GenerationAsk, tokenizer: ModelTokenizer | None, tokenizing: Tokenizing
) -> tuple[int, ...]:
    if isinstance(ask.prompt, tuple):
        return ask.prompt
    field = "messages" if ask.prompt is None else "prompt"
    if tokenizer is None:
        raise InvalidRequest(f"{field} is text, but the model has no tokenizer; send token ids", field=field)
    token_ids = await _encode(ask, tokenizer, tokenizing)
    if not token_ids:
        raise InvalidRequest(f"{field} has no tokens", field=field)
    if len(token_ids) > MAX_PROMPT_TOKENS:
        raise _too_long(len(token_ids), field)
    return token_ids


async def _encode(ask: GenerationAsk, tokenizer: ModelTokenizer, tokenizing: Tokenizing) -> tuple[int, ...]:
    if ask.messages is not None:
        return await tokenizing.encode_chat(
            tokenizer,
            ask.messages,
            cache_salt=ask.cache_salt,
            tools=ask.tools,
            add_generation_prompt=ask.add_generation_prompt,
            variables=ask.template_variables,
        )
    assert isinstance(ask.prompt, str)
    if ask.chat:
        message = {"role": "user", "content": ask.prompt}
        return await tokenizing.encode_chat(tokenizer, [message], cache_salt=ask.cache_salt)
    return await tokenizing.encode(tokenizer, ask.prompt, cache_salt=ask.cache_salt)


def _with_seed(sampling: SamplingParams) -> SamplingParams:
    if sampling.is_greedy or sampling.seed is not None:
        return sampling
    return replace(sampling, seed=SystemRandom().randint(0, MAX_SEED))


def check_timeout(timeout_s: object, field: str) -> None:
    """None, or seconds above 0 within a day. Raises, naming `field`."""
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise InvalidRequest(f"{field} must be a number, got {timeout_s!r}", field=field)
    if seconds(timeout_s, field, is_positive=True) > MAX_TIMEOUT_S:
        raise InvalidRequest(f"{field} must be at most {MAX_TIMEOUT_S:g}, got {timeout_s:g}", field=field)


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


def check_messages(messages: Sequence[Mapping[str, object]]) -> None:
    """Turns with a role and words; those of the assistant may hold tool calls instead. Raises, naming the
    field."""
    if not messages:
        raise InvalidRequest("messages must hold at least one message", field="messages")
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{field} must be a mapping with role and content", field=field)
        check_text(message.get("role"), f"{field}.role")
        if message.get("content") is not None or not message.get("tool_calls"):
            check_text(message.get("content"), f"{field}.content")


def _too_long(num_tokens: int, field: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(f"{field} has {num_tokens} tokens, at most {MAX_PROMPT_TOKENS}", field=field)
