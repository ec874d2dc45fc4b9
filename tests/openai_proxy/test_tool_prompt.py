"""What a model is told of its tools: by its template where that knows tools, else in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvrelay.client.chat_template import ChatTemplate
from kvrelay.openai_proxy.config import ToolFormat
from kvrelay.openai_proxy.schema.chat import Message, Tool
from kvrelay.openai_proxy.tool_calls.hermes import HermesParser
from kvrelay.openai_proxy.tool_calls.llama import LlamaParser
from kvrelay.openai_proxy.tool_calls.prompt import ToolPrompt, choose_format, tool_prompt

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
KNOWS_TOOLS = "{{ tools | tojson }}" + PLAIN
FUNCTION = {"name": "f", "description": "does", "parameters": {"type": "object"}, "strict": True}
TOOL = Tool.model_validate({"type": "function", "function": FUNCTION})
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}


def messages(*given: dict[str, Any]) -> list[Message]:
    return [Message.model_validate(message) for message in given]


USER = {"role": "user", "content": "go"}
TURNS = [
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "5"},
]


def prompt(template: str, tools: list[Tool], *given: dict[str, Any]) -> ToolPrompt:
    return tool_prompt(messages(*given), tools, template, ToolFormat.AUTO)


def test_a_template_that_knows_tools_gets_them_and_calls_as_objects() -> None:
    made = prompt(KNOWS_TOOLS, [TOOL], *TURNS)
    shown = {name: value for name, value in FUNCTION.items() if name != "strict"}
    assert made.tools == [{"type": "function", "function": shown}]
    assert made.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": "é"}}
    assert made.messages[1]["content"] == ""
    assert made.messages[2] == {"role": "tool", "content": "5", "tool_call_id": "c1"}


def test_no_tools_change_nothing() -> None:
    for template in (PLAIN, KNOWS_TOOLS):
        made = prompt(template, [], USER)
        assert (made.messages, made.tools) == ([USER], None)


def test_a_template_that_knows_no_tools_is_told_in_the_system_message() -> None:
    made = prompt(PLAIN, [TOOL], {"role": "system", "content": "Be kind."}, USER)
    assert made.tools is None
    assert [message["role"] for message in made.messages] == ["system", "user"]
    told = made.messages[0]["content"]
    assert told.startswith("Be kind.\n\n")
    line = told.split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(line) == {"name": "f", "description": "does", "parameters": {"type": "object"}}


def test_a_system_message_is_made_where_there_is_none() -> None:
    assert [message["role"] for message in prompt(PLAIN, [TOOL], USER).messages] == ["system", "user"]


def test_a_template_that_knows_no_tools_is_shown_calls_and_results_as_words(parse: Any) -> None:
    made = prompt(PLAIN, [TOOL], *TURNS)
    assert parse(made.parser(["f"]), [made.messages[2]["content"]]) == ("", [("f", '{"x": "é"}')])
    assert made.messages[3] == {"role": "user", "content": "<tool_response>\n5\n</tool_response>"}
    assert "tool_calls" not in made.messages[2]
    assert "é" in ChatTemplate(PLAIN, {}).render(made.messages)


def test_words_beside_a_call_stay() -> None:
    made = prompt(PLAIN, [], USER, {"role": "assistant", "content": "Hm.", "tool_calls": [CALL]})
    assert made.messages[1]["content"].startswith("Hm.\n<tool_call>\n")


def test_earlier_calls_are_shown_though_no_tools_are_given_now() -> None:
    made = prompt(PLAIN, [], *TURNS)
    assert [message["role"] for message in made.messages] == ["user", "assistant", "user"]
    assert "<tool_call>" in made.messages[1]["content"]


@pytest.mark.parametrize(("arguments", "shown"), [("", {}), ("{oops", "{oops"), ("[1]", [1])])
def test_earlier_arguments_that_are_no_object_do_no_harm(arguments: str, shown: object) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    made = prompt(KNOWS_TOOLS, [], {"role": "assistant", "tool_calls": [call]})
    assert made.messages[0]["tool_calls"][0]["function"]["arguments"] == shown


def test_parts_are_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    made = prompt(PLAIN, [], {"role": "developer", "content": parts, "name": "Ada"})
    assert made.messages == [{"role": "system", "content": "ab", "name": "Ada"}]


@pytest.mark.parametrize(
    ("template", "wanted", "found"),
    [
        (PLAIN, ToolFormat.AUTO, ToolFormat.HERMES),
        ("<tool_call> tools", ToolFormat.AUTO, ToolFormat.HERMES),
        ("<|python_tag|> tools", ToolFormat.AUTO, ToolFormat.LLAMA),
        ('{"name": f, "parameters": p} tools', ToolFormat.AUTO, ToolFormat.LLAMA),
        ('<tool_call>{"name": f, "parameters": p} tools', ToolFormat.AUTO, ToolFormat.HERMES),
        ("<|python_tag|> tools", ToolFormat.HERMES, ToolFormat.HERMES),
        ("<tool_call> tools", ToolFormat.LLAMA, ToolFormat.LLAMA),
    ],
)
def test_the_format_is_what_was_configured_or_what_the_template_mentions(
    template: str, wanted: ToolFormat, found: ToolFormat
) -> None:
    assert choose_format(template, wanted) is found
    parser = tool_prompt(messages(USER), [TOOL], template, wanted).parser(["f"])
    knows_tools = "tools" in template
    assert isinstance(parser, LlamaParser if found is ToolFormat.LLAMA and knows_tools else HermesParser)
