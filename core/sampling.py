"""How the next token is drawn from the model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvrelay.core.errors import InvalidRequest

MAX_STOP_TOKENS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_SEED: Final = 2**63 - 1
MAX_LOGIT_BIASES: Final = 1024
MAX_LOGIT_BIAS: Final = 100.0
MAX_GRAMMAR_BYTES: Final = 64 << 10
_MAX_ID_BYTES: Final = 5
_MAX_BIAS_BYTES: Final = _MAX_ID_BYTES + 8


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output must match.

    `source` is a JSON schema as JSON text, a regular expression (Rust's syntax; a digit is an ASCII one), or
    a Lark grammar in llguidance's dialect; empty for JSON_OBJECT, which is any JSON object. Whether a node
    can compile it only the node knows.

    Raises:
        InvalidRequest: it is missing, too long or no Unicode text; `field` is ``sampling.grammar``.
    """

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, GrammarKind):
            raise _bad_grammar(f"kind must be one of {', '.join(GrammarKind)}, got {self.kind!r}")
        if not isinstance(self.source, str):
            raise _bad_grammar(f"source must be a string, got {self.source!r:.100}")
        if bool(self.source) == (self.kind is GrammarKind.JSON_OBJECT):
            raise _bad_grammar(f"source must {'' if self.source else 'not '}be empty for {self.kind}")
        try:
            num_bytes = len(self.source.encode())
        except UnicodeEncodeError as error:
            raise _bad_grammar(f"source is not valid Unicode: {error.reason}") from error
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise _bad_grammar(f"source has {num_bytes} bytes, at most {MAX_GRAMMAR_BYTES}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling parameters, validated when built.

    Order of operations: `logit_bias` added to the raw logits; repetition, presence and frequency penalties;
    the tokens that `min_tokens` and `grammar` forbid are struck out; temperature; then top-k, top-p and
    min-p; then one draw by the Gumbel-max trick, whose noise is a function of (seed, absolute position of
    the drawn token) alone.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 are off. `seed` None means that the
    router draws one when it accepts the request, so that every attempt samples alike.
    `max_tokens` counts all output tokens, those of earlier attempts included.
    `num_logprobs` None: no logprobs; 0: only the chosen token's; k: also the k likeliest tokens', from
    the log-softmax of the raw logits, before biases, penalties, forbidden tokens and temperature.
    `min_tokens`: no end-of-sequence or stop token is drawn before that many output tokens; a grammar whose
    match is complete ends all the same.
    `logit_bias`: pairs of a token id and what is added to its logit; ids are unique.
    `grammar`: the output matches it, unless `max_tokens` or a stop token cuts it short. Where nothing more
    can follow, an end-of-sequence token does, and ends the output even with `ignore_eos`.

    Raises:
        InvalidRequest: a parameter is out of range; `field` is ``sampling.<name>``.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _require_float("temperature", self.temperature, 0.0, 100.0)
        _require_int("top_k", self.top_k, 0, 2**31 - 1)
        _require_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("sampling.top_p must be above 0", field="sampling.top_p")
        _require_float("min_p", self.min_p, 0.0, 1.0)
        _require_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _require_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, MAX_SEED)
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(
                f"sampling.stop_token_ids has {len(self.stop_token_ids)} entries, at most {MAX_STOP_TOKENS}",
                field="sampling.stop_token_ids",
            )
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0, 2**31 - 1)
        if self.num_logprobs is not None:
            _require_int("num_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        _require_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_logit_bias(self.logit_bias)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise _bad_grammar(f"must be a Grammar, got {self.grammar!r:.100}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def ends_at_eos(self) -> bool:
        """Whether an end-of-sequence token ends the output: a grammar allows none but at its end."""
        return not self.ignore_eos or self.grammar is not None

    @property
    def max_extra_bytes(self) -> int:
        """At most so many bytes of a message are the parameters whose size varies."""
        num_grammar_bytes = 0 if self.grammar is None else len(self.grammar.source.encode())
        num_ids = len(self.stop_token_ids)
        return num_ids * _MAX_ID_BYTES + len(self.logit_bias) * _MAX_BIAS_BYTES + num_grammar_bytes

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _bad_grammar(fault: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.grammar: {fault}", field="sampling.grammar")


def _check_logit_bias(logit_bias: tuple[tuple[int, float], ...]) -> None:
    if len(logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequest(
            f"sampling.logit_bias has {len(logit_bias)} entries, at most {MAX_LOGIT_BIASES}",
            field="sampling.logit_bias",
        )
    for token_id, bias in logit_bias:
        _require_int("logit_bias", token_id, 0, 2**31 - 1)
        _require_float("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    if len(dict(logit_bias)) < len(logit_bias):
        raise InvalidRequest("sampling.logit_bias names a token id twice", field="sampling.logit_bias")


def _require_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(
            f"sampling.{name} must be an integer from {low} to {high}, got {value!r}",
            field=f"sampling.{name}",
        )


def _require_float(name: str, value: float, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise InvalidRequest(
            f"sampling.{name} must be a number from {low:g} to {high:g}, got {value!r}",
            field=f"sampling.{name}",
        )
