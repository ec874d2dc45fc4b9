"""A response's output items, and the events that tell how they grow. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvrelay.openai_proxy.response_object import JsonObject, new_function_call, new_message, text_part
from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text, ToolEvent, ToolParser

Emit = Callable[[str, JsonObject], bytes]
"""Makes one event of its type and value."""


class ResponseOutput:
    """Turns an answer's text into items: messages and function calls, one after the other."""

    def __init__(self, parser: ToolParser | None) -> None:
        self.items: list[JsonObject] = []
        self._parser = parser
        self._is_open = False

    def add(self, text: str, logprobs: list[JsonObject], emit: Emit) -> bytes:
        """The events for the next part of the text."""
        if self._parser is None:
            return self._text(text, logprobs, emit) if text or logprobs else b""
        return self._take(self._parser.push(text), emit)

    def end(self, status: str, emit: Emit) -> bytes:
        """The events that end the last item, which is `status` then."""
        written = self._take(self._parser.finish(), emit) if self._parser is not None else b""
        if not self.items:
            written += self._text("", [], emit)
        return written + self._close(status, emit)

    def _take(self, events: Sequence[ToolEvent], emit: Emit) -> bytes:
        written = b""
        for event in events:
            match event:
                case Text(text):
                    written += self._text(text, [], emit)
                case CallStarted(_, name):
                    written += self._close("completed", emit) + self._open(new_function_call(name), emit)
                case CallArguments(_, json_text):
                    written += self._arguments(json_text, emit)
        return written

    def _text(self, text: str, logprobs: list[JsonObject], emit: Emit) -> bytes:
        written = b""
        if not self._is_open or self.items[-1]["type"] != "message":
            written += self._close("completed", emit) + self._open(new_message(), emit)
            part = text_part("", [])
            self.items[-1]["content"].append(part)
            written += emit(
                "response.content_part.added", {**self._place(), "content_index": 0, "part": part}
            )
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text or logprobs:
            value = {**self._place(), "content_index": 0, "delta": text, "logprobs": logprobs}
            written += emit("response.output_text.delta", value)
        return written

    def _arguments(self, json_text: str, emit: Emit) -> bytes:
        self.items[-1]["arguments"] += json_text
        return emit("response.function_call_arguments.delta", {**self._place(), "delta": json_text})

    def _open(self, item: JsonObject, emit: Emit) -> bytes:
        self.items.append(item)
        self._is_open = True
        shown = {**item, "content": []} if item["type"] == "message" else dict(item)
        return emit("response.output_item.added", {"output_index": len(self.items) - 1, "item": shown})

    def _close(self, status: str, emit: Emit) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            written = self._close_text(item["content"][0], emit)
        else:
            item["arguments"] = item["arguments"] or "{}"
            value = {**self._place(), "name": item["name"], "arguments": item["arguments"]}
            written = emit("response.function_call_arguments.done", value)
        return written + emit(
            "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}
        )

    def _close_text(self, part: JsonObject, emit: Emit) -> bytes:
        place = {**self._place(), "content_index": 0}
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        return emit("response.output_text.done", {**place, **text}) + emit(
            "response.content_part.done", {**place, "part": part}
        )

    def _place(self) -> JsonObject:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
