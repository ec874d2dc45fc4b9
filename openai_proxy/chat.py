"""``POST /v1/chat/completions``."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvrelay.client import GenerationChunk, GenerationResult, GenerationStream, ModelTokenizer
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.sampling import Grammar
from kvrelay.openai_proxy.answer_parts import json_answer, stream_answer
from kvrelay.openai_proxy.chat_events import chat_events
from kvrelay.openai_proxy.chat_words import finish_reason, new_call_id
from kvrelay.openai_proxy.choices import read_choices
from kvrelay.openai_proxy.errors import bad_request
from kvrelay.openai_proxy.event_stream import while_connected
from kvrelay.openai_proxy.logprobs import chat_logprobs, num_logprobs_of
from kvrelay.openai_proxy.sampling import AS_MANY_AS_FIT, grammar_of, sampling_of
from kvrelay.openai_proxy.schema.chat import ChatBody, Function, NamedTool
from kvrelay.openai_proxy.service import Call, usage_of
from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text, ToolEvent, ToolParser
from kvrelay.openai_proxy.tool_calls.forced import forced_calls
from kvrelay.openai_proxy.tool_calls.one_call import OneCallParser
from kvrelay.openai_proxy.tool_calls.prompt import ToolPrompt, tool_prompt


@dataclass(slots=True, eq=False)
class ChatAsk:
    """One request, understood: what is shown to the model, and how its answer is read."""

    body: ChatBody
    call: Call
    model: ModelInfo
    tokenizer: ModelTokenizer
    prompt: ToolPrompt

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Tokens that end an answer and are not shown."""
        return frozenset((*self.model.eos_token_ids, *self.body.stop_token_ids))

    @property
    def has_tools(self) -> bool:
        return bool(self.body.tools) and self.body.tool_choice != "none"

    def parser(self) -> ToolParser | None:
        """For one choice; None: the answer is text."""
        if not self.has_tools:
            return None
        parser = self.prompt.parser([tool.function.name for tool in self.body.tools])
        return parser if self.body.parallel_tool_calls else OneCallParser(parser)

    def streams(self) -> list[GenerationStream]:
        """One per choice; nothing has started.

        Raises:
            ApiError, InvalidRequest: a field can't be served.
        """
        body = self.body
        sampling = sampling_of(
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens or AS_MANY_AS_FIT,
            num_logprobs=num_logprobs_of(body.logprobs, body.top_logprobs),
            grammar=self._grammar(),
        )
        return [
            self.call.generate(
                body,
                self.model,
                sampling,
                index,
                messages=self.prompt.messages,
                tools=self.prompt.tools,
                template_variables=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
            )
            for index in range(body.n)
        ]

    def _grammar(self) -> Grammar | None:
        body = self.body
        wanted = grammar_of(body.structured_outputs, body.response_format)
        functions = self._forced_functions()
        if not functions:
            return wanted
        if wanted is not None:
            raise bad_request("tool_choice can't force a call and response_format the answer", "tool_choice")
        may_repeat = body.parallel_tool_calls and body.tool_choice == "required"
        return forced_calls(functions, self.prompt.format, may_repeat=may_repeat)

    def _forced_functions(self) -> list[Function]:
        """Those of which the model has to call one; none: it is free."""
        choice, functions = self.body.tool_choice, [tool.function for tool in self.body.tools]
        if isinstance(choice, NamedTool):
            return [function for function in functions if function.name == choice.function.name]
        return functions if choice == "required" else []


async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Continue a conversation: one answer, or a stream of its parts.

    Raises:
        ApiError, KVRelayError: before anything is answered.
    """
    call = Call.of(request)
    call.params |= {"prompt_token_ids": "messages", "sampling.grammar": _grammar_param(body)}
    ask = await understand(body, call)
    streams = ask.streams()
    if body.stream:
        return await stream_answer(request, chat_events(ask, streams))
    return json_answer(await while_connected(request, _whole_answer(ask, streams)))


def _grammar_param(body: ChatBody) -> str:
    """The field that a grammar comes from."""
    if body.structured_outputs is not None:
        return "structured_outputs"
    return "tools" if body.response_format is None else "response_format"


async def understand(body: ChatBody, call: Call) -> ChatAsk:
    """What the request means for the model that it names.

    Raises:
        ApiError, KVRelayError: it can't be served.
    """
    config = call.service.config
    if body.n > config.max_choices:
        raise bad_request(f"n must be at most {config.max_choices}, got {body.n}", "n")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ", "max_tokens")
    model = await call.service.client.find_model(body.model)
    tokenizer = await call.service.client.tokenizer(model.name)
    if tokenizer.chat_template is None:
        raise InvalidRequest(f"model {model.name!r} has no chat template", field="messages")
    tools = [] if body.tool_choice == "none" else body.tools
    prompt = tool_prompt(body.messages, tools, tokenizer.chat_template.source, config.tool_format)
    return ChatAsk(body, call, model, tokenizer, prompt)


async def _whole_answer(ask: ChatAsk, streams: list[GenerationStream]) -> dict[str, Any]:
    parts = [WholeChoice(ask.parser()) for _ in streams]
    async with aclosing(read_choices(streams)) as chunks:
        async for index, chunk in chunks:
            if chunk is not None:
                parts[index].add(chunk)
    results = [stream.result for stream in streams]
    for result in results:
        ask.call.count(result)
    choices = [
        part.choice(ask, index, result)
        for index, (part, result) in enumerate(zip(parts, results, strict=True))
    ]
    return {
        "id": f"chatcmpl-{ask.call.request_id}",
        "object": "chat.completion",
        "created": ask.call.created_s,
        "model": ask.model.name,
        "choices": choices,
        "usage": usage_of(results),
        "system_fingerprint": None,
    }


class WholeChoice:
    """One choice of an answer that is given in one piece."""

    def __init__(self, parser: ToolParser | None) -> None:
        self._parser = parser
        self.text = ""
        self.calls: list[dict[str, Any]] = []

    def add(self, chunk: GenerationChunk) -> None:
        """Take the next part."""
        self._take([Text(chunk.text)] if self._parser is None else self._parser.push(chunk.text))

    def end(self) -> None:
        """No part follows."""
        self._take([] if self._parser is None else self._parser.finish())
        for call in self.calls:
            call["function"]["arguments"] = call["function"]["arguments"] or "{}"

    def _take(self, events: list[ToolEvent]) -> None:
        for event in events:
            match event:
                case Text(text):
                    self.text += text
                case CallStarted(_, name):
                    function = {"name": name, "arguments": ""}
                    self.calls.append({"id": new_call_id(), "type": "function", "function": function})
                case CallArguments(index, json_text):
                    self.calls[index]["function"]["arguments"] += json_text

    def choice(self, ask: ChatAsk, index: int, result: GenerationResult) -> dict[str, Any]:
        """The JSON object."""
        self.end()
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": self.calls}
        logprobs = None
        if ask.body.logprobs:
            content = chat_logprobs(result.token_ids, result.logprobs, ask.tokenizer, ask.hidden_ids)
            logprobs = {"content": content, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason(result, has_calls=bool(self.calls)),
        }
