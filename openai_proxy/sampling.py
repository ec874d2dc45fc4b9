"""From OpenAI's sampling fields to kvrelay's. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from kvrelay.core.sampling import MAX_SEED, Grammar, GrammarKind, SamplingParams
from kvrelay.openai_proxy.errors import bad_request
from kvrelay.openai_proxy.schema.base import SamplingBody, StructuredOutputs
from kvrelay.openai_proxy.schema.chat import ResponseFormat

AS_MANY_AS_FIT: Final = 2**31 - 1
"""`max_tokens` of an answer that ends by itself, or where the context does."""
_SEED_STEP: Final = 0x9E3779B97F4A7C15
"""Spreads the seeds of the choices of one request."""


def sampling_of(
    body: SamplingBody, *, max_tokens: int, num_logprobs: int | None, grammar: Grammar | None
) -> SamplingParams:
    """What an engine is asked for.

    Raises:
        ApiError: a field can't be read.
        InvalidRequest: a value is out of range; `field` is ``sampling.<name>``.
    """
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(body.min_tokens, max_tokens),
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=None if body.seed is None else body.seed & MAX_SEED,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        num_logprobs=num_logprobs,
        logit_bias=_logit_bias(body.logit_bias),
        grammar=grammar,
    )


def for_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """The sampling of one of `n` choices: they differ, but the same seed gives the same ones."""
    if index == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + index * _SEED_STEP) & MAX_SEED)


def _logit_bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for key, bias in given.items():
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise bad_request(f"logit_bias: {key!r} is no token id", "logit_bias")
        found[int(key)] = bias
    return tuple(found.items())


def grammar_of(
    structured: StructuredOutputs | None, response_format: ResponseFormat | None
) -> Grammar | None:
    """What the output has to match, asked for in one way or the other.

    Raises:
        ApiError: both are given.
    """
    formatted = None if response_format is None else _of_format(response_format)
    if structured is None:
        return formatted
    if formatted is not None:
        raise bad_request(
            "structured_outputs can't be given together with response_format", "structured_outputs"
        )
    return _of_structured(structured)


def json_grammar(schema: Mapping[str, object]) -> Grammar:
    """JSON that fulfils a schema."""
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, separators=(",", ":")))


def _of_format(wanted: ResponseFormat) -> Grammar | None:
    if wanted.type == "json_object":
        return Grammar(GrammarKind.JSON_OBJECT)
    return None if wanted.json_schema is None else json_grammar(wanted.json_schema.schema_)


def _of_structured(wanted: StructuredOutputs) -> Grammar:
    if wanted.json_schema is not None:
        return json_grammar(wanted.json_schema)
    if wanted.regex is not None:
        return Grammar(GrammarKind.REGEX, wanted.regex)
    if wanted.choice is not None:
        return Grammar(GrammarKind.REGEX, "|".join(re.escape(choice) for choice in wanted.choice))
    if wanted.grammar is not None:
        return Grammar(GrammarKind.LARK, wanted.grammar)
    return Grammar(GrammarKind.JSON_OBJECT)
