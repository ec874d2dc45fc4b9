"""A forced call: the grammar that an engine follows lets through calls that fit, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.sampling import Grammar
from kvrelay.engine.config import GrammarLimits
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.engine.grammar import GrammarCompiler
from kvrelay.openai_proxy.config import ToolFormat
from kvrelay.openai_proxy.sampling import grammar_of
from kvrelay.openai_proxy.schema.base import StructuredOutputs
from kvrelay.openai_proxy.schema.chat import Function
from kvrelay.openai_proxy.tool_calls.forced import MAX_FORCED_CALLS, forced_calls
from kvrelay.openai_proxy.tool_calls.hermes import HermesParser
from kvrelay.openai_proxy.tool_calls.llama import LlamaParser

pytestmark = pytest.mark.model

EOS, VOCAB_SIZE = 2, 49_152
WEATHER = Function(
    name="get.weather-1",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_pattern": ".*"},
    },
)
ANYTHING = Function(name="note")
BOTH = [WEATHER, ANYTHING]
PARIS = '<tool_call>\n{"name": "get.weather-1", "arguments": {"city": "Par\\"is}", "days": 2}}\n</tool_call>'
NOTE = '<tool_call>\n{"name": "note", "arguments": {"any": [1, {"x": null}]}}\n</tool_call>'
Accepts = Callable[[Grammar, str], bool]


@pytest.fixture(scope="session")
def accepts() -> Accepts:
    folder = ensure_smollm2()
    compiler = GrammarCompiler(folder, VOCAB_SIZE, [EOS], GrammarLimits())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def check(grammar: Grammar, text: str) -> bool:
        matcher = compiler.start(grammar, ())
        try:
            matcher.take(tokenizer.encode(text, add_special_tokens=False).ids)
        except InvalidRequest:
            return False
        return bool(matcher.allowed()[EOS])

    return check


@pytest.mark.parametrize("text", [PARIS, NOTE])
def test_a_call_of_any_function_with_fitting_arguments_passes(
    accepts: Accepts, text: str, parse: Any
) -> None:
    assert accepts(forced_calls(BOTH, ToolFormat.HERMES, may_repeat=False), text)
    words, calls = parse(HermesParser(), [text])
    assert (words, len(calls)) == ("", 1)
    json.loads(calls[0][1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Well.",
        PARIS[:-1],
        f"I will. {PARIS}",
        f"{PARIS} Done.",
        PARIS.replace("get.weather-1", "getXweather-1"),
        PARIS.replace('"days": 2', '"days": 0'),
        PARIS.replace('"days": 2', '"hours": 2'),
        PARIS.replace('"city": "Par\\"is}", ', ""),
        PARIS.replace(": 2", ":   2"),
        f"{PARIS}\n{NOTE}",
    ],
)
def test_whatever_is_not_one_fitting_call_does_not_pass(accepts: Accepts, text: str) -> None:
    assert not accepts(forced_calls(BOTH, ToolFormat.HERMES, may_repeat=False), text)


def test_a_function_that_was_not_asked_for_does_not_pass(accepts: Accepts) -> None:
    only = forced_calls([WEATHER], ToolFormat.HERMES, may_repeat=False)
    assert accepts(only, PARIS)
    assert not accepts(only, NOTE)


def test_calls_may_repeat_up_to_the_bound(accepts: Accepts, parse: Any) -> None:
    several = forced_calls(BOTH, ToolFormat.HERMES, may_repeat=True)
    for number in (1, 2, MAX_FORCED_CALLS):
        text = "\n".join([PARIS, *[NOTE] * (number - 1)])
        assert accepts(several, text)
        assert len(parse(HermesParser(), [text])[1]) == number
    assert not accepts(several, "\n".join([PARIS] * (MAX_FORCED_CALLS + 1)))


def test_llamas_format_is_forced_as_its_parser_reads_it(accepts: Accepts, parse: Any) -> None:
    one = '{"name": "note", "parameters": {"a": "; {"}}'
    grammar = forced_calls(BOTH, ToolFormat.LLAMA, may_repeat=True)
    assert accepts(grammar, f"{one}; {one}")
    assert not accepts(grammar, NOTE)
    assert parse(LlamaParser(["note"]), [f"{one}; {one}"]) == ("", [("note", '{"a": "; {"}')] * 2)


@pytest.mark.parametrize("choices", [["yes", "no"], ["a.b", "(c|d)*", "é [\\]^$", 'x/y "z"\n\t#&~-<>']])
def test_a_choice_is_one_of_the_texts_to_the_letter(accepts: Accepts, choices: list[str]) -> None:
    grammar = grammar_of(StructuredOutputs.model_validate({"choice": choices}), None)
    assert grammar is not None
    for choice in choices:
        assert accepts(grammar, choice)
        assert not accepts(grammar, choice[:-1])
        assert not accepts(grammar, f"{choice}!")
    assert not accepts(grammar, "axb")
