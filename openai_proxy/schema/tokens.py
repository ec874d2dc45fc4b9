"""The bodies of ``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from kvrelay.openai_proxy.schema.base import MAX_NAME_CHARS, Body, fault
from kvrelay.openai_proxy.schema.chat import MAX_MESSAGES, MAX_TOOLS, Message, Tool

MAX_TOKENS = 1 << 20


class TokenizeBody(Body):
    """Text, or a conversation as the model is shown it: exactly one of `prompt` and `messages`."""

    model: str = Field(default="", max_length=MAX_NAME_CHARS)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=64)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "or messages must be given, not both")
        return self


class DetokenizeBody(Body):
    """Token ids."""

    model: str = Field(default="", max_length=MAX_NAME_CHARS)
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKENS)]
    skip_special_tokens: bool = False
