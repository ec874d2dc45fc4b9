"""What the terms of a placement's scores mean, and what became of those that predict something. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvrelay.cli.answer_report import format_ms
from kvrelay.core.explanation import Decision, Explanation
from kvrelay.core.node_messages import Role

_MEANINGS: Final = {
    "queue_s": "until the node starts on it",
    "pull_s": "to fetch what another node holds of its prefix",
    "prefill_s": "to compute the rest",
    "others_s": "what it adds to the time of all others",
    "overhead_s": "messages to the node and back",
    "cached_tokens": "prompt tokens that need not be computed",
    "own_tokens": "those in the node's own cache",
    "handoff_s": "from the prefill's end until all KV has arrived",
    "decode_s": "the expected output, a step for each token",
    "itl_s": "a step with this sequence in it",
    "held_tokens": "prompt tokens whose KV need not be sent",
    "fullness": "share of blocks or places set aside, with this one",
}
_SHOWN_ONLY: Final = frozenset({"cached_tokens", "own_tokens", "itl_s", "held_tokens", "fullness"})
_UNKNOWN: Final = "-"


def meaning_lines(decision: Decision) -> list[str]:
    """One line for each known term of the decision's candidates, in their order."""
    names = dict.fromkeys(name for candidate in decision.candidates for name, _ in candidate.terms)
    known = [name for name in names if name in _MEANINGS]
    width = max(map(len, known), default=0)
    return [
        f"{name:<{width}}  {_MEANINGS[name]}{' (not in the score)' if name in _SHOWN_ONLY else ''}"
        for name in known
    ]


def comparison_rows(explanation: Explanation) -> list[tuple[str, ...]]:
    """What the chosen pair's terms predicted beside what was measured, under a row of column names; empty
    where the policy predicts nothing."""
    decision, measured = explanation.decision, explanation.measured
    prefill = _terms_of(decision, Role.PREFILL)
    decode = _terms_of(decision, Role.DECODE)
    rows = [
        _seconds("wait at the prefill node", prefill.get("queue_s"), measured.prefill_queue_s),
        _seconds("prefill", prefill.get("prefill_s"), measured.prefill_compute_s),
        _count("cached tokens", prefill.get("cached_tokens"), measured.num_cached_tokens),
        _seconds("TTFT from this placement", decision.predicted_ttft_s, measured.placed_ttft_s),
        _seconds("handoff", decode.get("handoff_s"), measured.handoff_s),
        _count("tokens not sent", decode.get("held_tokens"), measured.num_held_tokens),
        _seconds("gap between tokens", decode.get("itl_s"), measured.itl_s),
    ]
    predicted = [row for row in rows if row[1] != _UNKNOWN]
    return [("", "predicted", "measured"), *predicted] if predicted else []


def _terms_of(decision: Decision, role: Role) -> Mapping[str, float]:
    """Those of the chosen node."""
    chosen = decision.prefill_node if role is Role.PREFILL else decision.decode_node
    found = (one for one in decision.candidates if one.role is role and one.node_id == chosen)
    return next((dict(candidate.terms) for candidate in found), {})


def _seconds(name: str, predicted_s: float | None, measured_s: float | None) -> tuple[str, ...]:
    return name, *(_UNKNOWN if value is None else format_ms(value) for value in (predicted_s, measured_s))


def _count(name: str, predicted: float | None, measured: float | None) -> tuple[str, ...]:
    return name, *(_UNKNOWN if value is None else f"{value:.0f}" for value in (predicted, measured))
