"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from kvrelay.openai_proxy.schema.base import SamplingBody, fault

TokenIds = list[int]
Prompt = str | TokenIds


def _as_prompts(value: object) -> object:
    """Text, token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value):
        return [value]
    return value


Prompts = Annotated[
    list[str] | list[TokenIds],
    BeforeValidator(_as_prompts),
    Field(min_length=1, description="text, token ids, or a list of either"),
]


class CompletionBody(SamplingBody):
    """Text to be continued."""

    prompt: Prompts
    max_tokens: int = Field(default=16, ge=1, le=2**31 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise fault("echo", "is not supported together with logprobs: prompts have no logprobs here")
        return self
