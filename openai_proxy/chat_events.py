"""A chat completion as a stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from kvrelay.client import GenerationChunk, GenerationStream
from kvrelay.openai_proxy.answer_parts import GeneratedEvents
from kvrelay.openai_proxy.chat_words import finish_reason, new_call_id
from kvrelay.openai_proxy.choices import read_choices
from kvrelay.openai_proxy.event_stream import EventSource, Write
from kvrelay.openai_proxy.logprobs import chat_logprobs
from kvrelay.openai_proxy.schema.base import StreamOptions
from kvrelay.openai_proxy.service import usage_of, usage_so_far
from kvrelay.openai_proxy.sse import DONE, TextEvent, event
from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text

if TYPE_CHECKING:
    from kvrelay.openai_proxy.chat import ChatAsk


def chat_events(ask: ChatAsk, streams: Sequence[GenerationStream]) -> EventSource:
    """The events of all choices of one request, in the order they come."""
    shapes = _Shapes(ask, streams)
    if len(streams) == 1:
        return _OneChoice(shapes, _Choice(shapes, ask, 0), streams[0])
    choices = [_Choice(shapes, ask, index) for index in range(len(streams))]
    return GeneratedEvents(_events_of_many(shapes, choices, streams))


class _OneChoice:
    """Most requests: nothing stands between the cluster's tokens and their events."""

    def __init__(self, shapes: _Shapes, choice: _Choice, stream: GenerationStream) -> None:
        self._shapes = shapes
        self._choice = choice
        self._stream = stream

    async def first(self) -> bytes:
        """The role, and the first token if it has text."""
        return self._choice.add(await anext(self._stream))

    async def rest(self, write: Write) -> None:
        """All others, each where its token arrives."""
        add = self._choice.add

        def take(chunk: GenerationChunk) -> Awaitable[None] | None:
            written = add(chunk)
            return write(written) if written else None

        await self._stream.each(take)
        pending = write(self._choice.end(self._stream) + self._shapes.end())
        if pending is not None:
            await pending

    async def aclose(self) -> None:
        """Cancel the request unless it is over."""
        await self._stream.aclose()


async def _events_of_many(
    shapes: _Shapes, choices: Sequence[_Choice], streams: Sequence[GenerationStream]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(read_choices(streams)) as chunks:
        async for index, chunk in chunks:
            choice = choices[index]
            written = choice.add(chunk) if chunk is not None else choice.end(streams[index])
            if written:
                yield written
    yield shapes.end()


class _Shapes:
    """What all events of a request have in common."""

    def __init__(self, ask: ChatAsk, streams: Sequence[GenerationStream]) -> None:
        self._ask = ask
        options = ask.body.stream_options or StreamOptions()
        self._has_usage = options.include_usage
        self.has_continuous_usage = options.include_usage and options.continuous_usage_stats
        self._streams = streams

    def end(self) -> bytes:
        """What follows the last choice's end."""
        if not self._has_usage:
            return DONE
        usage = usage_of([stream.result for stream in self._streams])
        return event({**self._envelope(), "choices": [], "usage": usage}) + DONE

    def shape(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        """One event's value."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        shape = {**self._envelope(), "choices": [choice]}
        if self.has_continuous_usage:
            return {**shape, "usage": usage_so_far(self._streams)}
        return {**shape, "usage": None} if self._has_usage else shape

    def _envelope(self) -> dict[str, Any]:
        call = self._ask.call
        return {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion.chunk",
            "created": call.created_s,
            "model": self._ask.model.name,
        }


class _Choice:
    """One choice's events."""

    def __init__(self, shapes: _Shapes, ask: ChatAsk, index: int) -> None:
        self._shapes = shapes
        self._ask = ask
        self._index = index
        self._parser = ask.parser()
        self._has_role = False
        self._call_arguments: list[str] = []
        self._text_event = TextEvent(shapes.shape(index, {"content": TextEvent.MARK}))

    def add(self, chunk: GenerationChunk) -> bytes:
        """The events for one more part, perhaps none."""
        written = b"" if self._has_role else self._role()
        if self._ask.body.logprobs:
            return written + self._with_logprobs(chunk)
        if self._parser is not None:
            return written + self._parsed(self._parser.push(chunk.text))
        return written + self._text(chunk.text) if chunk.text else written

    def end(self, stream: GenerationStream) -> bytes:
        """The last events."""
        result = stream.result
        self._ask.call.count(result)
        written = b"" if self._has_role else self._role()
        if self._parser is not None:
            written += self._parsed(self._parser.finish())
            for number, arguments in enumerate(self._call_arguments):
                if not arguments:
                    written += self._delta(_arguments_delta(number, "{}"))
        reason = finish_reason(result, has_calls=bool(self._call_arguments))
        return written + event(self._shapes.shape(self._index, {}, finish_reason=reason))

    def _text(self, text: str) -> bytes:
        if self._shapes.has_continuous_usage:
            return self._delta({"content": text})
        return self._text_event.with_text(text)

    def _role(self) -> bytes:
        self._has_role = True
        return self._delta({"role": "assistant", "content": ""})

    def _delta(self, delta: dict[str, Any], **more: Any) -> bytes:
        return event(self._shapes.shape(self._index, delta, **more))

    def _with_logprobs(self, chunk: GenerationChunk) -> bytes:
        entries = chat_logprobs(chunk.token_ids, chunk.logprobs, self._ask.tokenizer, self._ask.hidden_ids)
        logprobs = {"content": entries, "refusal": None}
        if self._parser is not None:
            parsed = self._parsed(self._parser.push(chunk.text))
            return (self._delta({}, logprobs=logprobs) if entries else b"") + parsed
        if not chunk.text and not entries:
            return b""
        return self._delta({"content": chunk.text}, logprobs=logprobs)

    def _parsed(self, events: Sequence[Text | CallStarted | CallArguments]) -> bytes:
        written = b""
        for found in events:
            match found:
                case Text(text):
                    written += self._text(text)
                case CallStarted(number, name):
                    self._call_arguments.append("")
                    written += self._delta(_call_delta(number, name))
                case CallArguments(number, json_text):
                    self._call_arguments[number] += json_text
                    written += self._delta(_arguments_delta(number, json_text))
        return written


def _call_delta(number: int, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"tool_calls": [{"index": number, "id": new_call_id(), "type": "function", "function": function}]}


def _arguments_delta(number: int, json_text: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": number, "function": {"arguments": json_text}}]}
