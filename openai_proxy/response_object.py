"""The objects of the Responses API. Pure."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from kvrelay.client import GenerationResult
from kvrelay.openai_proxy.chat_words import new_call_id
from kvrelay.openai_proxy.schema.responses import ResponseBody

JsonObject = dict[str, Any]


def new_message(status: str = "in_progress") -> JsonObject:
    """A message without words."""
    return {
        "type": "message",
        "id": f"msg_{uuid4().hex}",
        "status": status,
        "role": "assistant",
        "content": [],
    }


def text_part(text: str, logprobs: list[JsonObject]) -> JsonObject:
    """A message's words."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def new_function_call(name: str) -> JsonObject:
    """A call without arguments."""
    return {
        "type": "function_call",
        "id": f"fc_{uuid4().hex}",
        "call_id": new_call_id(),
        "name": name,
        "arguments": "",
        "status": "in_progress",
    }


def response_object(
    body: ResponseBody,
    response_id: str,
    created_s: int,
    model: str,
    output: list[JsonObject],
    result: GenerationResult | None,
) -> JsonObject:
    """A response; `result` None: it is under way."""
    is_cut = result is not None and result.finish_reason == "length"
    text_format = body.text.format if body.text and body.text.format else None
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_s,
        "status": "in_progress" if result is None else "incomplete" if is_cut else "completed",
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "model": model,
        "output": output,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature,
        "text": {
            "format": text_format.model_dump(by_alias=True, exclude_none=True)
            if text_format
            else {"type": "text"}
        },
        "tool_choice": body.tool_choice
        if isinstance(body.tool_choice, str)
        else body.tool_choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": body.truncation,
        "usage": None if result is None else _usage(result),
        "user": body.user or None,
    }


def _usage(result: GenerationResult) -> JsonObject:
    num_input, num_output = result.report.num_prompt_tokens, len(result.token_ids)
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": result.report.num_cached_tokens},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }
