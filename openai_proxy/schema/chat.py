"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvrelay.openai_proxy.schema.base import Body, Json, Name, SamplingBody, check_names_differ, fault

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_PARTS = 1024


class ContentPart(Body):
    """A part of a message. Only text is served."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(Body):
    """`arguments` is JSON text, as the model wrote it."""

    name: Name
    arguments: str = ""


class ToolCall(Body):
    """A call that the assistant made earlier."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """One turn. `content` may be left out where the assistant called tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise fault("content", "is required")
        if self.tool_calls and self.role != "assistant":
            raise fault("tool_calls", "may be given only with role assistant")
        return self


class Function(Body):
    """A tool's name, what it does, and a JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: Json = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class Tool(Body):
    """Only functions are served."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Which function."""

    name: Name


class NamedTool(Body):
    """The model has to call this one."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """The schema that an answer has to fulfil; it always does, `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "answer"
    description: str = ""
    schema_: Json = Field(default_factory=dict, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """Plain text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault("json_schema", "must be given with type json_schema, and only there")
        return self


class ChatBody(SamplingBody):
    """A conversation to be continued."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1, description="see max_completion_tokens")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="left out: as many as the context has room for"
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=64)
    add_generation_prompt: bool = True
    # Accepted, since their only sound values change nothing here.
    store: Literal[False] = False
    modalities: list[Literal["text"]] = Field(default=["text"], max_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "may be given only with logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise fault("tool_choice", "may be given only with tools")
        names = [tool.function.name for tool in self.tools]
        check_names_differ(names)
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise fault("tool_choice", f"names {self.tool_choice.function.name!r}, which is not in tools")
        return self
