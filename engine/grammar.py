"""Grammars that outputs must match: compiled, kept, and followed token by token. Behind it is llguidance.

A matcher belongs to one sequence and is made from the request alone: it starts at the output's beginning
and takes the tokens that are there already. So nothing of it moves in a handoff, and a continuation or a
preempted sequence goes on where it was.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from torch import Tensor

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.sampling import Grammar, GrammarKind
from kvrelay.engine.config import GrammarLimits

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

logger = logging.getLogger(__name__)

_WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between two tokens of JSON: room for a line break and some indentation, not for an endless run of them."""
_JSON_OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_pattern": _WHITESPACE,
    "json_allow_general_unicode_escapes": True,
}
_ANY_OBJECT: Final = '{"type":"object"}'
_MAX_FAULT_CHARS: Final = 400

Compile = Callable[[], LLMatcher]


class GrammarCompiler:
    """The grammars of one model's tokenizer. Used by one thread.

    The last `limits.num_cached` compiled ones are kept. A folder without a tokenizer.json that fits the
    model is no error: then every grammar is refused, saying why.
    """

    def __init__(
        self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int], limits: GrammarLimits
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._limits = limits
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._why_none = ""
        try:
            self._tokenizer = _load_tokenizer(folder, vocab_size, eos_token_ids)
        except ValueError as error:
            self._why_none = str(error)
            logger.warning("grammars will be refused: %s", error)

    def start(self, grammar: Grammar, output_token_ids: Sequence[int]) -> GrammarMatcher:
        """A matcher that has taken `output_token_ids`.

        Raises:
            InvalidRequest: the grammar can't be compiled within the limits, or has no such output;
                `field` is ``sampling.grammar``.
        """
        matcher = GrammarMatcher(
            self._find(grammar).deep_copy(), self._vocab_size, lambda: self._compile_anew(grammar)
        )
        matcher.take(output_token_ids)
        return matcher

    def _find(self, grammar: Grammar) -> LLMatcher:
        found = self._compiled.pop(grammar, None) or self._compile(grammar)
        self._compiled[grammar] = found  # the most recently used is the last
        if len(self._compiled) > self._limits.num_cached:
            self._compiled.popitem(last=False)
        return found

    def _compile_anew(self, grammar: Grammar) -> LLMatcher:
        """One that shares nothing: copies share a lexer, which all their users' states fill up."""
        self._compiled.pop(grammar, None)
        return self._compile(grammar)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._tokenizer is None:
            raise _refusal(self._why_none)
        try:
            source = _as_llguidance(grammar)
        except (ValueError, RecursionError) as error:
            raise _refusal(str(error)) from error
        compiled = LLMatcher(self._tokenizer, source, log_level=0, limits=_parser_limits(self._limits))
        _check(compiled)
        first = compiled.deep_copy()
        first.compute_bitmask()  # sets the lexer up, and finds out what has no match at all
        _check(first)
        return compiled


class GrammarMatcher:
    """Where one output stands in its grammar. Mutable; only goes forward."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, compile_anew: Compile) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._compile_anew = compile_anew
        self._is_shared = True
        self._output: list[int] = []

    @property
    def num_tokens(self) -> int:
        """How much of the output it has taken."""
        return len(self._output)

    def take(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens of the output.

        Raises:
            InvalidRequest: the grammar does not allow them, or a limit was met.
        """
        if not token_ids:
            return
        self._output += token_ids
        if not self._matcher.consume_tokens(list(token_ids)):
            self._start_alone()

    def allowed(self) -> Tensor:
        """Which tokens may come next, ``[vocab_size]`` bool. Where the match is complete and nothing more can
        follow: the end-of-sequence tokens alone.

        Raises:
            InvalidRequest: a limit was met.
        """
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():  # the mask is then that of a complete match
            self._start_alone()
            bits = self._matcher.compute_bitmask()
            _check(self._matcher)
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._vocab_size, bitorder="little")
        return torch.from_numpy(mask).view(torch.bool)

    def _start_alone(self) -> None:
        """Come here again without sharing: other outputs may have filled a limit, only this one's counts."""
        if self._is_shared:
            self._is_shared = False
            self._matcher = self._compile_anew()
            self._matcher.consume_tokens(self._output)
        _check(self._matcher)


def _load_tokenizer(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Raises ValueError: there is none, or it does not fit the model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError("the model has no tokenizer.json")
    if not eos_token_ids:
        raise ValueError("the model names no end-of-sequence token")
    try:
        return LLTokenizer(str(path), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except ValueError as error:
        raise ValueError(f"the model's tokenizer.json can't be used: {error}") from error


def _as_llguidance(grammar: Grammar) -> str:
    """The grammar as `LLMatcher` takes it. Raises ValueError, RecursionError: it is no JSON schema."""
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema(_ANY_OBJECT, overrides=_JSON_OPTIONS)
        case GrammarKind.JSON_SCHEMA:
            schema = json.loads(grammar.source)
            if not isinstance(schema, dict):
                raise ValueError("the JSON schema must be an object")
            return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
        case GrammarKind.REGEX:
            regex = regex_to_lark(grammar.source, use_ascii="d")
            return LLMatcher.grammar_from_lark(f"start: /{regex}/")
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.source)


def _parser_limits(limits: GrammarLimits) -> LLParserLimits:
    return LLParserLimits(
        max_items_in_row=limits.max_items_in_row,
        initial_lexer_fuel=limits.initial_lexer_fuel,
        step_lexer_fuel=limits.step_lexer_fuel,
        step_max_items=limits.step_max_items,
        max_lexer_states=limits.max_lexer_states,
        max_grammar_size=limits.max_grammar_size,
        verbose_errors=False,
    )


def _check(matcher: LLMatcher) -> None:
    """Raises InvalidRequest: the matcher is of no use."""
    if matcher.is_error():
        raise _refusal(_shorten(matcher.get_error()))


def _shorten(fault: str) -> str:
    """llguidance's message on one line."""
    words = " ".join(fault.replace("<non-verbose/>", "").split())
    return words if len(words) <= _MAX_FAULT_CHARS else words[: _MAX_FAULT_CHARS - 1] + "…"


def _refusal(fault: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.grammar: {fault}", field="sampling.grammar")
