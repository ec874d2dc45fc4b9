"""Loaded by schemathesis: asks for the model that is there, and for short answers.

What the OpenAPI document can't say, such as which fields go together, is put right in every other request,
since most would be refused for that alone.
"""

from __future__ import annotations

from typing import Any

import schemathesis

MODEL = "sim"
MAX_TOKENS = 8
MAX_CHOICES = 2
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LIMIT_OF_PATH = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


def _is_large(value: object, most: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > most


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change what is about to be sent."""
    if isinstance(case.body, dict):
        case.body = _bounded(case.body, _LIMIT_OF_PATH.get(case.operation.path))
    if case.path_parameters and len(str(case.path_parameters.get("model"))) % 2 == 0:
        case.path_parameters = {**case.path_parameters, "model": MODEL}


def _bounded(body: dict[str, Any], limit: str | None) -> dict[str, Any]:
    """Odd values stay as they are; sound ones that would take long are shortened."""
    bounded = {
        name: MAX_TOKENS if name in _LIMITS and _is_large(value, MAX_TOKENS) else value
        for name, value in body.items()
    }
    if isinstance(bounded.get("model", ""), str):
        bounded["model"] = MODEL
    if limit is not None and bounded.get(limit) is None:
        bounded[limit] = MAX_TOKENS
    if _is_large(bounded.get("n"), MAX_CHOICES):
        bounded["n"] = MAX_CHOICES
    return _put_right(bounded) if len(repr(body)) % 2 else bounded


def _put_right(body: dict[str, Any]) -> dict[str, Any]:
    for name in ("stream_options", "structured_outputs", "response_format", "top_logprobs", "tool_choice"):
        body.pop(name, None)
    if isinstance(body.get("messages"), list):
        body["messages"] = [_turn(message) for message in body["messages"]]
        body.pop("prompt", None)
    if body.get("prompt") == []:
        body["prompt"] = "x"
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(number): bias for number, bias in enumerate(body["logit_bias"].values())}
    if isinstance(body.get("tokens"), list):
        body["tokens"] = [token % 1000 for token in body["tokens"] if type(token) is int]
    return body


def _turn(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    turn = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**turn, "content": "x"} if turn.get("content") is None else turn
