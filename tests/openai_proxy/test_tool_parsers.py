"""Tool calls in a model's words: found whole, whatever the cuts, and never made of what is none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text, ToolParser
from kvrelay.openai_proxy.tool_calls.hermes import HermesParser
from kvrelay.openai_proxy.tool_calls.llama import LlamaParser
from kvrelay.openai_proxy.tool_calls.one_call import OneCallParser

THOROUGH = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400
)
NESTED = '{"a": {"b": [1, {"c": "}]{[\\"\\\\"}]}, "d": "<tool_call>"}'

HERMES = {
    "no call": ("just words", "just words", []),
    "nothing": ("", "", []),
    "one": ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", [("f", '{"x": 1}')]),
    "words before": ('Well.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "Well.", [("f", "{}")]),
    "words after": ('<tool_call>{"name": "f"}</tool_call>\nDone.', "\nDone.", [("f", "")]),
    "two": (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"y": []}}\n</tool_call>\n',
        "",
        [("f", "{}"), ("g", '{"y": []}')],
    ),
    "arguments first": (
        '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
        "",
        [("f", '{"x": 1}')],
    ),
    "arguments as a string": (
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": \\"\\u00e9\\"}"}</tool_call>',
        "",
        [("f", '{"x": "é"}')],
    ),
    "parameters": ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', "", [("f", '{"x": 1}')]),
    "nested, braces in strings": (
        f'<tool_call>{{"name": "f", "arguments": {NESTED}}}</tool_call>',
        "",
        [("f", NESTED)],
    ),
    "an escaped name": (
        '<tool_call>{"name": "f\\u00fc\\"", "arguments": {}}</tool_call>',
        "",
        [('fü"', "{}")],
    ),
    "more keys": (
        '<tool_call>{"id": {"name": "x"}, "name": "f", "arguments": {}, "z": [1]}</tool_call>',
        "",
        [("f", "{}")],
    ),
    "arguments that are a number": (
        '<tool_call>{"name": "f", "arguments": 5 }</tool_call>',
        "",
        [("f", "5")],
    ),
    "the first name counts": ('<tool_call>{"name": "f", "name": "g"}</tool_call>', "", [("f", "")]),
    "the first arguments count": (
        '<tool_call>{"name": "f", "arguments": {"x": 1}, "parameters": "y"}</tool_call>',
        "",
        [("f", '{"x": 1}')],
    ),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    "a list": ("<tool_call>[1, 2]</tool_call>", "<tool_call>[1, 2]</tool_call>", []),
    "words in the tag": ("<tool_call>hm</tool_call>", "<tool_call>hm</tool_call>", []),
    "a tag within a tag": (
        '<tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "<tool_call>",
        [("f", "{}")],
    ),
    "cut in the tag": ("words <tool_ca", "words <tool_ca", []),
    "cut before the name": ('<tool_call>{"na', '<tool_call>{"na', []),
    "cut in the arguments": ('<tool_call>{"name": "f", "arguments": {"x": [1', "", [("f", '{"x": [1')]),
    "cut in the closing tag": ('<tool_call>{"name": "f", "arguments": {}}</tool', "", [("f", "{}")]),
    "no closing tag": (
        '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    "blanks alone": ("  \n ", "  \n ", []),
    "blanks within words": ("a  b \n c ", "a  b \n c ", []),
}
LLAMA = {
    "no call": ("just words", "just words", []),
    "nothing": ("", "", []),
    "one": ('{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
    "with its tag": ('<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    "two": (
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    "blanks around": (' \n{"name": "f", "parameters": {}}\n', "", [("f", "{}")]),
    "arguments": ('{"name": "f", "arguments": {"x": 1}}', "", [("f", '{"x": 1}')]),
    "arguments first": ('{"parameters": {"x": 1}, "name": "f"}', "", [("f", '{"x": 1}')]),
    "nested, braces in strings": (f'{{"name": "f", "parameters": {NESTED}}}', "", [("f", NESTED)]),
    "JSON that is no call": ('{"capital": "Paris"}', '{"capital": "Paris"}', []),
    "another name": ('{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    "words before": ('So: {"name": "f", "parameters": {}}', 'So: {"name": "f", "parameters": {}}', []),
    "words after": ('{"name": "f", "parameters": {}} ok?', " ok?", [("f", "{}")]),
    "a broken object": ('{"x": 1]', '{"x": 1]', []),
    "cut before the name": ('{"na', '{"na', []),
    "cut in the tag": ("<|python", "<|python", []),
    "cut in the arguments": ('{"name": "f", "parameters": {"x', "", [("f", '{"x')]),
    "blanks alone": (" \n", " \n", []),
}
CASES = [
    *(pytest.param(HermesParser, *case, id=f"hermes: {name}") for name, case in HERMES.items()),
    *(
        pytest.param(lambda: LlamaParser(["f", "g"]), *case, id=f"llama: {name}")
        for name, case in LLAMA.items()
    ),
]


@pytest.mark.parametrize(("make", "text", "words", "calls"), CASES)
def test_words_and_calls_are_told_apart_whatever_the_cuts(
    make: Callable[[], ToolParser], text: str, words: str, calls: list[Any], parse: Any
) -> None:
    assert parse(make(), [text]) == (words, calls)
    assert parse(make(), list(text)) == (words, calls)
    for size in (2, 3, 7):
        assert parse(make(), [text[start : start + size] for start in range(0, len(text), size)]) == (
            words,
            calls,
        )


FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool",
            "<|python_tag|>",
            "<|",
            ";",
            "{",
            "}",
            "[",
            "]",
            ":",
            ",",
            '"',
        ),
        *(
            '{"name": "f", "arguments": ',
            '{"x": 1}',
            '"name"',
            '"arguments"',
            '"parameters"',
            '"f"',
            "\\",
            "\\u",
        ),
        *(' "x"', "5 ", "null", " ", "\n", "words", '"{\\"x\\": 2}"', '"\\q"', '{"name": "f"', "}}"),
    ]
)


@THOROUGH
@given(fragments=st.lists(FRAGMENTS, max_size=14), cuts=st.lists(st.integers(0, 150), max_size=12))
@example(fragments=['{"name": "f"', "]"], cuts=[12])
@example(fragments=["<tool_call>", '{"name": "f"', "]"], cuts=[24])
@pytest.mark.parametrize("kind", ["hermes", "llama", "one call"])
def test_the_cuts_never_matter(kind: str, fragments: list[str], cuts: list[int], parse: Any) -> None:
    def make() -> ToolParser:
        if kind == "llama":
            return LlamaParser(["f"])
        return OneCallParser(HermesParser()) if kind == "one call" else HermesParser()

    text = "".join(fragments)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(edges)]
    assert parse(make(), parts) == parse(make(), [text])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@THOROUGH
@given(
    calls=st.lists(
        st.tuples(
            st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3)
        ),
        min_size=1,
        max_size=3,
    ),
    indent=st.sampled_from([None, 2]),
    is_ascii=st.booleans(),
    is_llama=st.booleans(),
    size=st.integers(1, 9),
)
def test_any_calls_that_a_model_writes_come_out_as_they_were_meant(
    calls: list[tuple[str, Any]], indent: int | None, is_ascii: bool, is_llama: bool, size: int, parse: Any
) -> None:
    key = "parameters" if is_llama else "arguments"
    written = [
        json.dumps({"name": name, key: arguments}, indent=indent, ensure_ascii=is_ascii)
        for name, arguments in calls
    ]
    text = (
        "; ".join(written) if is_llama else "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in written)
    )
    parser = LlamaParser([name for name, _ in calls]) if is_llama else HermesParser()
    words, found = parse(parser, [text[start : start + size] for start in range(0, len(text), size)])
    assert words == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_a_call_streams_as_soon_as_its_name_is_known() -> None:
    parser = HermesParser()
    assert parser.push('ok <tool_call>{"name": "f"') == [Text("ok"), CallStarted(0, "f")]
    assert parser.push(', "arguments": {"x"') == [CallArguments(0, '{"x"')]
    assert parser.push(": 1") == [CallArguments(0, ": 1")]
    assert parser.push("}}") == [CallArguments(0, "}")]


def test_plain_words_are_not_held_back() -> None:
    parser = HermesParser()
    assert [parser.push(part) for part in ("a", " b", " <", "c")] == [
        [Text("a")],
        [Text(" b")],
        [],
        [Text(" <c")],
    ]


def test_only_the_first_call_is_kept_where_one_is_allowed(parse: Any) -> None:
    text = (
        'hi <tool_call>{"name": "f", "arguments": {}}</tool_call> and <tool_call>{"name": "g"}</tool_call> so'
    )
    assert parse(OneCallParser(HermesParser()), list(text)) == ("hi", [("f", "{}")])
    assert parse(OneCallParser(HermesParser()), ["no call ", "at all"]) == ("no call at all", [])


def test_a_long_call_costs_time_in_proportion_to_its_length() -> None:
    parser, num_chars = HermesParser(), 200_000
    parser.push('<tool_call>{"name": "f", "arguments": {"text": "')
    taken = sum(len(event.json_text) for _ in range(num_chars // 4) for event in parser.push("word"))
    assert taken == num_chars
