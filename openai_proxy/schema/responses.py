"""The body of ``POST /v1/responses``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from kvrelay.openai_proxy.schema.base import (
    MAX_NAME_CHARS,
    Body,
    Json,
    Name,
    ServiceTier,
    check_names_differ,
    fault,
)
from kvrelay.openai_proxy.schema.chat import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS

_FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class TextPart(Body):
    """A part of a message. `annotations` and `logprobs` come back from earlier answers, and say nothing."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class MessageItem(Body):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(Body):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)]
    id: str | None = None
    status: str | None = None


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem


class FunctionTool(Body):
    """A tool's name, what it does, and a JSON schema of its arguments."""

    type: Literal["function"]
    name: _FunctionName
    description: str = ""
    parameters: Json = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class FunctionChoice(Body):
    """The model has to call this one."""

    type: Literal["function"]
    name: Name


class TextFormat(Body):
    """Plain text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "answer"
    description: str = ""
    schema_: Json | None = Field(default=None, alias="schema")
    strict: bool = False

    @model_validator(mode="after")
    def _schema_where_needed(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise fault("schema", "must be given with type json_schema, and only there")
        return self


class TextSettings(Body):
    """How the answer's text is to be."""

    format: TextFormat | None = None


class ResponseStreamOptions(Body):
    """`include_obfuscation` is a no-op: nothing is padded."""

    include_obfuscation: bool = False


class ResponseBody(Body):
    """A conversation to be continued. Nothing is stored, so `previous_response_id` is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    model: str = Field(default="", max_length=MAX_NAME_CHARS)
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_logprobs: int = Field(default=0, ge=0, le=20)
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextSettings | None = None
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list, max_length=1)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    user: str = Field(default="", max_length=1024)
    service_tier: ServiceTier = "auto"
    # Accepted, since their only sound values change nothing here.
    store: Literal[False] = False
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"

    @model_validator(mode="after")
    def _choice_fits_tools(self) -> ResponseBody:
        choice = self.tool_choice
        if choice not in ("auto", "none") and not self.tools:
            raise fault("tool_choice", "may be given only with tools")
        check_names_differ([tool.name for tool in self.tools])
        if isinstance(choice, FunctionChoice) and choice.name not in [tool.name for tool in self.tools]:
            raise fault("tool_choice", f"names {choice.name!r}, which is not in tools")
        return self
