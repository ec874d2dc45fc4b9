"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvrelay.client import GenerationStream, ModelTokenizer
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.errors import InvalidRequest
from kvrelay.openai_proxy.answer_parts import GeneratedEvents, json_answer, stream_answer
from kvrelay.openai_proxy.choices import read_choices
from kvrelay.openai_proxy.errors import bad_request
from kvrelay.openai_proxy.event_stream import while_connected
from kvrelay.openai_proxy.logprobs import CompletionLogprobs
from kvrelay.openai_proxy.sampling import grammar_of, sampling_of
from kvrelay.openai_proxy.schema.base import StreamOptions
from kvrelay.openai_proxy.schema.completions import CompletionBody
from kvrelay.openai_proxy.service import Call, usage_of, usage_so_far
from kvrelay.openai_proxy.sse import DONE, TextEvent, event


@dataclass(slots=True, eq=False)
class CompletionAsk:
    """One request, understood. Choice ``i`` continues prompt ``i // body.n``. `tokenizer` is None where only
    token ids go in and the model has none: the answer's texts are empty then."""

    body: CompletionBody
    call: Call
    model: ModelInfo
    tokenizer: ModelTokenizer | None

    def streams(self) -> list[GenerationStream]:
        """One per prompt and choice; nothing has started.

        Raises:
            ApiError, InvalidRequest: a field can't be served.
        """
        body = self.body
        sampling = sampling_of(
            body,
            max_tokens=body.max_tokens,
            num_logprobs=body.logprobs,
            grammar=grammar_of(body.structured_outputs, None),
        )
        return [
            self.call.generate(
                body, self.model, sampling, index, prompt=prompt, decode_text=self.tokenizer is not None
            )
            for index, prompt in enumerate(prompt for prompt in body.prompt for _ in range(body.n))
        ]

    def echoes(self) -> list[str]:
        """What stands before each choice's text."""
        texts = [self._echo(prompt) if self.body.echo else "" for prompt in self.body.prompt]
        return [text for text in texts for _ in range(self.body.n)]

    def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise bad_request("echo needs the model's tokenizer, which no node has given", "echo")
        return self.tokenizer.decode(prompt, skip_special_tokens=self.body.skip_special_tokens)

    def logprobs(self) -> CompletionLogprobs | None:
        """For one choice; None: not asked for."""
        if self.body.logprobs is None:
            return None
        if self.tokenizer is None:
            raise bad_request("logprobs need the model's tokenizer, which no node has given", "logprobs")
        hidden_ids = frozenset((*self.model.eos_token_ids, *self.body.stop_token_ids))
        return CompletionLogprobs(self.tokenizer, hidden_ids, self.body.logprobs)

    def envelope(self) -> dict[str, Any]:
        """What answers and events begin with."""
        return {
            "id": f"cmpl-{self.call.request_id}",
            "object": "text_completion",
            "created": self.call.created_s,
            "model": self.model.name,
        }


async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue text or token ids: one answer, or a stream of its parts.

    Raises:
        ApiError, KVRelayError: before anything is answered.
    """
    call = Call.of(request)
    call.params |= {"sampling.num_logprobs": "logprobs", "sampling.grammar": "structured_outputs"}
    ask = await _understand(body, call)
    streams = ask.streams()
    if body.stream:
        return await stream_answer(request, GeneratedEvents(_events(ask, streams)))
    return json_answer(await while_connected(request, _whole_answer(ask, streams)))


async def _understand(body: CompletionBody, call: Call) -> CompletionAsk:
    config = call.service.config
    if body.n > config.max_choices:
        raise bad_request(f"n must be at most {config.max_choices}, got {body.n}", "n")
    if len(body.prompt) > config.max_prompts:
        raise bad_request(f"prompt holds {len(body.prompt)} prompts, at most {config.max_prompts}", "prompt")
    model = await call.service.client.find_model(body.model)
    tokenizer = await call.service.client.tokenizer(model.name) if model.tokenizer_digest else None
    if tokenizer is None and any(isinstance(prompt, str) for prompt in body.prompt):
        raise InvalidRequest(f"model {model.name!r} has no tokenizer; send token ids", field="prompt")
    return CompletionAsk(body, call, model, tokenizer)


async def _whole_answer(ask: CompletionAsk, streams: list[GenerationStream]) -> dict[str, Any]:
    echoes, logprobs = ask.echoes(), [ask.logprobs() for _ in streams]
    async with aclosing(read_choices(streams)) as chunks:
        async for _ in chunks:
            pass
    results = [stream.result for stream in streams]
    choices = []
    for index, (result, echo, columns) in enumerate(zip(results, echoes, logprobs, strict=True)):
        ask.call.count(result)
        choices.append(
            {
                "index": index,
                "text": echo + result.text,
                "logprobs": columns and columns.columns(result.token_ids, result.logprobs),
                "finish_reason": str(result.finish_reason),
            }
        )
    return {**ask.envelope(), "choices": choices, "usage": usage_of(results, len(ask.body.prompt))}


async def _events(ask: CompletionAsk, streams: list[GenerationStream]) -> AsyncGenerator[bytes, None]:
    options = ask.body.stream_options or StreamOptions()
    has_usage = options.include_usage
    usage_now = None
    if has_usage and options.continuous_usage_stats:
        usage_now = partial(usage_so_far, streams, len(ask.body.prompt))
    choices = [_Choice(ask, index, has_usage, usage_now) for index in range(len(streams))]
    for choice, echo in zip(choices, ask.echoes(), strict=True):
        choice.echo = echo
    async with aclosing(read_choices(streams)) as chunks:
        async for index, chunk in chunks:
            if chunk is None:
                ask.call.count(streams[index].result)
                yield choices[index].end(str(streams[index].result.finish_reason))
            elif written := choices[index].add(chunk.text, chunk.token_ids, chunk.logprobs):
                yield written
    if has_usage:
        usage = usage_of([stream.result for stream in streams], len(ask.body.prompt))
        yield event({**ask.envelope(), "choices": [], "usage": usage})
    yield DONE


class _Choice:
    """One choice's events. `echo` goes before the first text."""

    def __init__(
        self,
        ask: CompletionAsk,
        index: int,
        has_usage: bool,
        usage_now: Callable[[], dict[str, Any]] | None,
    ) -> None:
        self.echo = ""
        self._ask = ask
        self._index = index
        self._more: dict[str, Any] = {"usage": None} if has_usage else {}
        self._usage_now = usage_now
        self._logprobs = ask.logprobs()
        self._text_event = TextEvent(self._shape(TextEvent.MARK))

    def add(self, text: str, token_ids: tuple[int, ...], logprobs: Any) -> bytes:
        """The event for one more part, or nothing."""
        text, self.echo = self.echo + text, ""
        if self._logprobs is not None:
            columns = self._logprobs.columns(token_ids, logprobs)
            return event(self._shape(text, logprobs=columns)) if text or columns["tokens"] else b""
        if self._usage_now is not None:
            return event(self._shape(text)) if text else b""
        return self._text_event.with_text(text) if text else b""

    def end(self, reason: str) -> bytes:
        """The last event."""
        text, self.echo = self.echo, ""
        return event(self._shape(text, finish_reason=reason))

    def _shape(self, text: str, **more: Any) -> dict[str, Any]:
        choice = {"index": self._index, "text": text, "logprobs": None, "finish_reason": None, **more}
        more = self._more if self._usage_now is None else {"usage": self._usage_now()}
        return {**self._ask.envelope(), "choices": [choice], **more}
