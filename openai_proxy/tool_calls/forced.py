"""A grammar that lets a model say nothing but calls of given tools, with arguments that fit their schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from kvrelay.core.sampling import Grammar, GrammarKind
from kvrelay.openai_proxy.config import ToolFormat
from kvrelay.openai_proxy.schema.chat import Function
from kvrelay.openai_proxy.tool_calls.hermes import CLOSE, OPEN

MAX_FORCED_CALLS: Final = 8
_COMPACT: Final = {
    "x-guidance": {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
}


def forced_calls(functions: Sequence[Function], format: ToolFormat, *, may_repeat: bool) -> Grammar:
    """One call of one of `functions`; with `may_repeat` up to `MAX_FORCED_CALLS`."""
    is_llama = format is ToolFormat.LLAMA
    before, after, between = ("", "", "; ") if is_llama else (f"{OPEN}\n", f"\n{CLOSE}", "\n")
    arguments = "parameters" if is_llama else "arguments"
    repeated = f" ({_text(between)} call){{0,{MAX_FORCED_CALLS - 1}}}" if may_repeat else ""
    choice = " | ".join(f"function_{index}" for index in range(len(functions)))
    rules = [
        f"start: call{repeated}",
        f"call: {_sequence(_text(before), f'({choice})', _text(after))}",
    ]
    for index, function in enumerate(functions):
        opening = _text(f'{{"name": {json.dumps(function.name)}, "{arguments}": ')
        rules.append(f"function_{index}: {opening} arguments_{index} {_text('}')}")
        rules.append(f"arguments_{index}: %json {json.dumps(_compact(function.parameters))}")
    return Grammar(GrammarKind.LARK, "\n".join(rules))


def _compact(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", **schema, **_COMPACT}


def _sequence(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _text(text: str) -> str:
    """A literal of the grammar, nothing for no text."""
    return json.dumps(text) if text else ""
