"""OpenAI's words in chat answers."""

from __future__ import annotations

from uuid import uuid4

from kvrelay.client import GenerationResult


def finish_reason(result: GenerationResult, *, has_calls: bool) -> str:
    """Why it ended, in OpenAI's words."""
    if has_calls and result.finish_reason == "stop":
        return "tool_calls"
    return str(result.finish_reason)


def new_call_id() -> str:
    """Names one tool call."""
    return f"call_{uuid4().hex[:24]}"
