"""What tests of the proxy share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text, ToolParser

Answer = tuple[str, list[tuple[str, str]]]
"""The words of an answer, and its calls: name and arguments."""


def parse(parser: ToolParser, parts: Sequence[str]) -> Answer:
    """What a parser makes of an answer that comes in these parts; checks that its events make sense."""
    words, calls = "", []
    for event in [*(event for part in parts for event in parser.push(part)), *parser.finish()]:
        match event:
            case Text(text):
                assert text, "an empty event says nothing"
                words += text
            case CallStarted(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, json_text):
                assert json_text
                assert index == len(calls) - 1, "arguments belong to the last call"
                calls[index] = (calls[index][0], calls[index][1] + json_text)
    return words, calls


@pytest.fixture(name="parse")
def parse_fixture() -> Callable[[ToolParser, Sequence[str]], Answer]:
    return parse
