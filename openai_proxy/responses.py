"""``POST /v1/responses``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from kvrelay.client import GenerationChunk, GenerationResult, GenerationStream
from kvrelay.openai_proxy.answer_parts import GeneratedEvents, json_answer, stream_answer
from kvrelay.openai_proxy.chat import ChatAsk, understand
from kvrelay.openai_proxy.choices import read_choices
from kvrelay.openai_proxy.errors import ApiError
from kvrelay.openai_proxy.event_stream import while_connected
from kvrelay.openai_proxy.logprobs import chat_logprobs
from kvrelay.openai_proxy.response_events import ResponseOutput
from kvrelay.openai_proxy.response_input import as_chat
from kvrelay.openai_proxy.response_object import JsonObject, response_object
from kvrelay.openai_proxy.schema.responses import ResponseBody
from kvrelay.openai_proxy.service import Call
from kvrelay.openai_proxy.service_tiers import served_tier
from kvrelay.openai_proxy.sse import named_event


async def create_response(body: ResponseBody, request: Request) -> Response:
    """Continue a conversation: one response, or a stream of events that build it.

    Raises:
        ApiError, KVRelayError: before anything is answered.
    """
    call = Call.of(request)
    is_formatted = body.text is not None and body.text.format is not None
    call.params |= {
        "prompt_token_ids": "input",
        "sampling.max_tokens": "max_output_tokens",
        "sampling.grammar": "text.format" if is_formatted else "tools",
    }
    ask = await understand(as_chat(body), call)
    answer = _Answer(body, ask)
    streams = ask.streams()
    if body.stream:
        return await stream_answer(request, GeneratedEvents(answer.events(streams)), answer.error_event)
    return json_answer(await while_connected(request, answer.whole(streams)))


class _Answer:
    """One response, built part by part."""

    def __init__(self, body: ResponseBody, ask: ChatAsk) -> None:
        self._body = body
        self._ask = ask
        self._id = f"resp_{ask.call.request_id}"
        self._num_events = 0
        self._output = ResponseOutput(ask.parser())

    async def whole(self, streams: list[GenerationStream]) -> JsonObject:
        """The response, when it is done."""
        async for _ in self.events(streams):
            pass
        return self._object(streams[0].result)

    async def events(self, streams: list[GenerationStream]) -> AsyncGenerator[bytes, None]:
        """Every event; closing it cancels what is under way.

        Raises:
            KVRelayError: the request can't be served.
        """
        emit = self._emit
        async with aclosing(read_choices(streams)) as chunks:
            async for _, chunk in chunks:
                written = b"" if self._num_events else self._opening()
                if chunk is not None:
                    written += self._output.add(chunk.text, self._logprobs(chunk), emit)
                else:
                    written += self._closing(streams[0].result)
                if written:
                    yield written

    def error_event(self, error: ApiError) -> bytes:
        """What ends a stream that failed."""
        failed = {**self._object(None), "status": "failed"}
        failed["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._emit("response.failed", {"response": failed})

    def _opening(self) -> bytes:
        value = {"response": self._object(None)}
        return self._emit("response.created", value) + self._emit("response.in_progress", value)

    def _closing(self, result: GenerationResult) -> bytes:
        self._ask.call.count(result)
        status = "incomplete" if result.finish_reason == "length" else "completed"
        written = self._output.end(status, self._emit)
        return written + self._emit(f"response.{status}", {"response": self._object(result)})

    def _logprobs(self, chunk: GenerationChunk) -> list[JsonObject]:
        if not self._ask.body.logprobs:
            return []
        ask = self._ask
        return chat_logprobs(chunk.token_ids, chunk.logprobs, ask.tokenizer, ask.hidden_ids)

    def _object(self, result: GenerationResult | None) -> JsonObject:
        call = self._ask.call
        output = self._output.items
        made = response_object(self._body, self._id, call.created_s, self._ask.model.name, output, result)
        return {**made, "service_tier": served_tier(self._body.service_tier, call.grant)}

    def _emit(self, kind: str, value: JsonObject) -> bytes:
        number = self._num_events
        self._num_events += 1
        return named_event(kind, {"type": kind, "sequence_number": number, **value})
