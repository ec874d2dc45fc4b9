"""What the model is told of its tools, and how it will write its calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvrelay.openai_proxy.config import ToolFormat
from kvrelay.openai_proxy.schema.chat import Message, Tool
from kvrelay.openai_proxy.tool_calls.events import ToolParser
from kvrelay.openai_proxy.tool_calls.hermes import CLOSE, OPEN, HermesParser
from kvrelay.openai_proxy.tool_calls.llama import LlamaParser

TemplateMessage = dict[str, Any]
_INSTRUCTIONS: Final = """You can call functions. They are, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write its name and arguments as a JSON object within tags, each call in tags of its own:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ToolPrompt:
    """`tools` go to the model's own template; None where it has no place for them, and `messages` tell of
    them instead. `format` is HERMES or LLAMA."""

    messages: list[TemplateMessage]
    tools: list[dict[str, Any]] | None
    format: ToolFormat

    def parser(self, names: Sequence[str]) -> ToolParser:
        """A fresh parser for one answer."""
        return LlamaParser(names) if self.format is ToolFormat.LLAMA else HermesParser()


def tool_prompt(
    messages: Sequence[Message], tools: Sequence[Tool], template: str, wanted: ToolFormat
) -> ToolPrompt:
    """Messages and tools as a chat template of that source takes them."""
    format = choose_format(template, wanted)
    has_calls = any(message.tool_calls or message.role == "tool" for message in messages)
    if "tools" in template or not (tools or has_calls):
        given = [tool.model_dump(exclude={"function": {"strict"}}) for tool in tools]
        return ToolPrompt([template_message(message) for message in messages], given or None, format)
    told = [_told_message(message) for message in messages]
    return ToolPrompt(_with_instructions(told, tools) if tools else told, None, ToolFormat.HERMES)


def choose_format(template: str, wanted: ToolFormat) -> ToolFormat:
    """HERMES or LLAMA: as wanted, else by what the template mentions."""
    if wanted is not ToolFormat.AUTO:
        return wanted
    if OPEN not in template and ("<|python_tag|>" in template or '"parameters": ' in template):
        return ToolFormat.LLAMA
    return ToolFormat.HERMES


def template_message(message: Message) -> TemplateMessage:
    """One turn in the words of Hugging Face templates: text content, and arguments as objects."""
    shown: TemplateMessage = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text_of(message),
    }
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            shown[name] = value
    return shown


def text_of(message: Message) -> str:
    """A turn's words."""
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or message.refusal or ""


def _arguments(json_text: str) -> object:
    try:
        return json.loads(json_text or "{}")
    except ValueError:
        return json_text


def _told_message(message: Message) -> TemplateMessage:
    """One turn for a template that knows neither calls nor their results."""
    shown = template_message(message)
    calls = [
        f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
        for call in shown.pop("tool_calls", ())
    ]
    if calls:
        shown["content"] = "\n".join([*([shown["content"]] if shown["content"] else []), *calls])
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{shown['content']}\n</tool_response>"}
    return shown


def _with_instructions(messages: list[TemplateMessage], tools: Sequence[Tool]) -> list[TemplateMessage]:
    shown = [json.dumps(tool.function.model_dump(exclude={"strict"}), ensure_ascii=False) for tool in tools]
    text = _INSTRUCTIONS.format(tools="\n".join(shown))
    if messages and messages[0]["role"] == "system":
        first: Mapping[str, Any] = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
