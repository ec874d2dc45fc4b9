"""A Responses request as the chat request that it amounts to. Pure."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kvrelay.openai_proxy.errors import bad_request, from_validation
from kvrelay.openai_proxy.schema.chat import ChatBody
from kvrelay.openai_proxy.schema.responses import (
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionChoice,
    Item,
    ResponseBody,
    TextPart,
)


def as_chat(body: ResponseBody) -> ChatBody:
    """The same conversation, tools and limits.

    Raises:
        ApiError: the conversation is larger than one may be.
    """
    try:
        return ChatBody.model_validate(_chat_fields(body))
    except ValidationError as error:
        reason = from_validation(error.errors()).message
        raise bad_request(f"input is a conversation that can't be served: {reason}", "input") from error


def _chat_fields(body: ResponseBody) -> dict[str, Any]:
    wants_logprobs = bool(body.include) or body.top_logprobs > 0
    has_choice = bool(body.tools) or body.tool_choice != "auto"
    return {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": wants_logprobs,
        "top_logprobs": body.top_logprobs if wants_logprobs else None,
        "tools": [_tool(tool.model_dump()) for tool in body.tools],
        "tool_choice": _tool_choice(body) if has_choice else None,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body),
        "user": body.user,
        "service_tier": body.service_tier,
    }


def _messages(body: ResponseBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        _add(messages, item)
    return messages


def _add(messages: list[dict[str, Any]], item: Item) -> None:
    """Calls that follow one another, or the assistant's words, are one turn of the assistant."""
    match item:
        case FunctionCallItem():
            last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
            if last is None:
                last = {"role": "assistant", "content": None}
                messages.append(last)
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            last.setdefault("tool_calls", []).append(call)
        case FunctionCallOutputItem():
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        case _:
            messages.append({"role": item.role, "content": _text(item.content)})


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(body: ResponseBody) -> object:
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _response_format(body: ResponseBody) -> dict[str, Any] | None:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return None
    if wanted.schema_ is None:
        return {"type": wanted.type}
    schema = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": schema}
