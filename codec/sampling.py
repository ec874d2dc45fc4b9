"""Sampling parameters, finish reasons and logprobs: what both services' messages hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from kvrelay.codec.bounds import MAX_TOKEN_ID
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.core.sampling import MAX_LOGPROBS, Grammar, GrammarKind, SamplingParams
from kvrelay.v1 import common_pb2

_OPTIONAL_FIELDS: Final = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "num_logprobs",
    "min_tokens",
)
_DEFAULTS: Final = SamplingParams()
_REASON_OF_NUMBER: Final = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_NUMBER_OF_REASON: Final = {reason: number for number, reason in _REASON_OF_NUMBER.items()}
_KIND_OF_NUMBER: Final = {
    common_pb2.GRAMMAR_KIND_JSON_OBJECT: GrammarKind.JSON_OBJECT,
    common_pb2.GRAMMAR_KIND_JSON_SCHEMA: GrammarKind.JSON_SCHEMA,
    common_pb2.GRAMMAR_KIND_REGEX: GrammarKind.REGEX,
    common_pb2.GRAMMAR_KIND_LARK: GrammarKind.LARK,
}
_NUMBER_OF_KIND: Final = {kind: number for number, kind in _KIND_OF_NUMBER.items()}


def encode_sampling(sampling: SamplingParams) -> common_pb2.SamplingParams:
    """Only what differs from the defaults is written."""
    changed = {
        name: getattr(sampling, name)
        for name in _OPTIONAL_FIELDS
        if getattr(sampling, name) != getattr(_DEFAULTS, name)
    }
    return common_pb2.SamplingParams(
        **changed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logit_bias_token_ids=[token_id for token_id, _ in sampling.logit_bias],
        logit_biases=[bias for _, bias in sampling.logit_bias],
        grammar=None if sampling.grammar is None else _encode_grammar(sampling.grammar),
    )


def decode_sampling(pb: common_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take kvrelay's defaults.

    Raises:
        InvalidRequest: a parameter is out of range; `field` is ``sampling.<name>``.
    """
    given = {name: getattr(pb, name) for name in _OPTIONAL_FIELDS if pb.HasField(name)}
    return SamplingParams(
        **given,
        stop_token_ids=tuple(pb.stop_token_ids),
        ignore_eos=pb.ignore_eos,
        logit_bias=_decode_logit_bias(pb),
        grammar=_decode_grammar(pb.grammar) if pb.HasField("grammar") else None,
    )


def _encode_grammar(grammar: Grammar) -> common_pb2.Grammar:
    return common_pb2.Grammar(kind=_NUMBER_OF_KIND[grammar.kind], source=grammar.source)


def _decode_grammar(pb: common_pb2.Grammar) -> Grammar:
    for known, kind in _KIND_OF_NUMBER.items():
        if pb.kind == known:
            return Grammar(kind, pb.source)
    raise InvalidRequest(f"sampling.grammar: {pb.kind} is no kind of grammar", field="sampling.grammar")


def _decode_logit_bias(pb: common_pb2.SamplingParams) -> tuple[tuple[int, float], ...]:
    ids, biases = pb.logit_bias_token_ids, pb.logit_biases
    if len(ids) != len(biases):
        raise InvalidRequest(
            f"sampling.logit_bias has {len(ids)} token ids and {len(biases)} biases",
            field="sampling.logit_bias",
        )
    return tuple(zip(ids, biases, strict=True))


def encode_finish_reason(reason: FinishReason) -> common_pb2.FinishReason:
    """The wire's enum value."""
    return _NUMBER_OF_REASON[reason]


def decode_finish_reason(number: int, field: str) -> FinishReason:
    """Raises InvalidRequest for an unspecified or unknown one."""
    for known, reason in _REASON_OF_NUMBER.items():
        if number == known:
            return reason
    raise InvalidRequest(f"{field} is {number}, which is no finish reason", field=field)


def encode_logprobs(column: Iterable[TokenLogprobs | None]) -> list[common_pb2.TokenLogprobs]:
    """One message per token."""
    return [
        common_pb2.TokenLogprobs()
        if entry is None
        else common_pb2.TokenLogprobs(
            present=True,
            chosen=entry.chosen,
            top_token_ids=[token_id for token_id, _ in entry.top],
            top_logprobs=[logprob for _, logprob in entry.top],
        )
        for entry in column
    ]


def decode_logprobs(
    column: Sequence[common_pb2.TokenLogprobs], num_tokens: int
) -> tuple[TokenLogprobs | None, ...]:
    """Empty, or one entry per token.

    Raises:
        InvalidRequest: another number of entries, or an entry's columns differ in length.
    """
    if len(column) not in (0, num_tokens):
        raise InvalidRequest(f"logprobs has {len(column)} entries for {num_tokens} tokens", field="logprobs")
    return tuple(_decode_entry(entry) for entry in column)


def _decode_entry(entry: common_pb2.TokenLogprobs) -> TokenLogprobs | None:
    if not entry.present:
        return None
    ids, logprobs = entry.top_token_ids, entry.top_logprobs
    if len(ids) != len(logprobs) or len(ids) > MAX_LOGPROBS or (ids and max(ids) > MAX_TOKEN_ID):
        raise InvalidRequest(
            f"logprobs.top_token_ids must hold at most {MAX_LOGPROBS} ids, one per entry of top_logprobs",
            field="logprobs.top_token_ids",
        )
    return TokenLogprobs(entry.chosen, tuple(zip(ids, logprobs, strict=True)))
