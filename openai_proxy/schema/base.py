"""What every request body has in common: strictness, and sampling fields under their usual names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIASES = 1024
MAX_NAME_CHARS = 256

StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]


def _without_nan(value: dict[str, Any]) -> dict[str, Any]:
    """Python's parser takes numbers that JSON has not, and what comes after it would choke on them."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("not_json", "holds a number that JSON has not: NaN or Infinity") from None
    return value


Json = Annotated[dict[str, Any], AfterValidator(_without_nan)]


def fault(param: str, message: str) -> PydanticCustomError:
    """What a check of several fields together raises: `param` is the one to be named."""
    return PydanticCustomError("fault", "{param} {text}", {"param": param, "text": message})


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


ServiceTier = Literal["auto", "default", "flex", "priority"]
"""OpenAI's names of priorities."""

Stops = Annotated[list[StopText], BeforeValidator(_one_as_list), Field(max_length=MAX_STOPS)]
"""One string or several."""


class Body(BaseModel):
    """Strict about types and unknown fields; a ``null`` field counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class StreamOptions(Body):
    """What a stream tells beside its tokens: `include_usage` at its end, `continuous_usage_stats` (as vLLM
    has it) also with every part. `include_obfuscation` is a no-op: nothing is padded."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class StructuredOutputs(Body):
    """Constrains the output, as vLLM calls it: exactly one of these."""

    json_schema: Json | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Name], Field(min_length=1, max_length=256)] | None = None
    grammar: str | None = Field(default=None, description="a Lark grammar, in llguidance's dialect")
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise fault(
                "structured_outputs", "must hold exactly one of json, json_object, regex, choice and grammar"
            )
        return self


class SamplingBody(Body):
    """Fields that chat and text completions share."""

    model: str = Field(default="", max_length=MAX_NAME_CHARS, description="may be empty where one is served")
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1, description="0 and -1: off")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    n: int = Field(default=1, ge=1)
    stop: Stops = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=64)
    include_stop_str_in_output: bool = False
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MAX_LOGIT_BIASES)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    min_tokens: int = Field(default=0, ge=0, le=2**31 - 1)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str = Field(default="", max_length=1024)
    service_tier: ServiceTier = "auto"
    cache_salt: str = Field(default="", max_length=128, description="prefixes are shared under one salt only")

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "may be given only with stream: true")
        return self


def check_names_differ(names: Sequence[str]) -> None:
    """Refuse tools that a call could not tell apart."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise fault("tools", f"has two functions of the name {name!r}")
