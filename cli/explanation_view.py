"""A placement's explanation as text. Pure: values in, text out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from kvrelay.cli.answer_report import format_bytes, format_ms
from kvrelay.cli.explanation_terms import comparison_rows, meaning_lines
from kvrelay.cli.faults import printable
from kvrelay.cli.status_view import format_duration
from kvrelay.cli.text_table import aligned_lines
from kvrelay.core.explanation import Candidate, Explanation, MeasuredRequest
from kvrelay.core.node_messages import Role

_NOT_YET: Final = "not yet"


def headline(explanation: Explanation) -> str:
    """Which request, at which router, placed when and by which policy."""
    return (
        f"request {explanation.request_id}, model {explanation.model or '?'}, router"
        f" {explanation.router_id or '?'}: placed {format_duration(explanation.placed_ago_s)} ago by"
        f" {explanation.decision.policy or '?'}"
    )


def candidate_rows(explanation: Explanation, role: Role) -> list[tuple[str, ...]]:
    """The candidates of one role under a row of column names: the chosen one first, then the least scores,
    then those that were out of the question."""
    decision = explanation.decision
    chosen = decision.prefill_node if role is Role.PREFILL else decision.decode_node
    candidates = sorted(
        (candidate for candidate in decision.candidates if candidate.role is role),
        key=lambda found: (found.node_id != chosen, bool(found.objection), found.score, found.node_id),
    )
    names = list(dict.fromkeys(name for candidate in candidates for name, _ in candidate.terms))
    rows = [(f"{role.value} node", "", "score", *names, "objection")]
    return rows + [_candidate_row(candidate, names, candidate.node_id == chosen) for candidate in candidates]


def outcome_lines(explanation: Explanation) -> list[str]:
    """What was predicted, beside what was measured so far or until the end."""
    decision, measured = explanation.decision, explanation.measured
    attempts = "" if measured.num_attempts <= 1 else f" (attempt {measured.num_attempts})"
    rows = {
        "placement": f"{decision.prefill_node} -> {decision.decode_node}{attempts}",
        "TTFT": _ttft(explanation),
        "pull": _pull(explanation),
        "prefill": _prefill(measured),
        "KV moved": _kv_moved(measured),
        "request": _request(measured),
    }
    if measured.error_code:
        # Of a request that goes on or went well it tells why there was more than one attempt.
        name = "error" if measured.state == "failed" else "last error"
        rows[name] = f"{measured.error_code}: {printable(measured.error_message)}"
    return [f"{name:<10} {text}" for name, text in rows.items() if text]


def plain_text(explanation: Explanation) -> str:
    """All of it as aligned columns."""
    lines = [headline(explanation), ""]
    for role in Role:
        lines += [*aligned_lines(candidate_rows(explanation, role)), ""]
    for section in (meaning_lines(explanation.decision), aligned_lines(comparison_rows(explanation))):
        lines += [*section, ""] if section else []
    return "\n".join([*lines, *outcome_lines(explanation)])


def explanation_as_json(explanation: Explanation) -> dict[str, object]:
    """All of it, ready for `json.dumps`; a candidate's terms as an object."""
    decision = asdict(explanation.decision)
    decision["candidates"] = [
        {**asdict(candidate), "terms": dict(candidate.terms)} for candidate in explanation.decision.candidates
    ]
    measured = {**asdict(explanation.measured), "itl_s": explanation.measured.itl_s}
    return {**asdict(explanation), "decision": decision, "measured": measured}


def _candidate_row(candidate: Candidate, names: list[str], is_chosen: bool) -> tuple[str, ...]:
    terms = dict(candidate.terms)
    return (
        candidate.node_id,
        "chosen" if is_chosen else "",
        _number(candidate.score),
        *(_number(terms[name]) if name in terms else "-" for name in names),
        printable(candidate.objection) or "-",
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _ttft(explanation: Explanation) -> str:
    predicted_s, measured = explanation.decision.predicted_ttft_s, explanation.measured
    predicted = "not predicted" if predicted_s is None else f"predicted {format_ms(predicted_s)}"
    placed, submitted = (
        _NOT_YET if time_s is None else format_ms(time_s)
        for time_s in (measured.placed_ttft_s, measured.ttft_s)
    )
    return f"{predicted}; measured {placed} from this placement, {submitted} from submission"


def _pull(explanation: Explanation) -> str:
    """Empty: there is none."""
    decision, measured = explanation.decision, explanation.measured
    if decision.pull_from is None:
        return ""
    planned = f"{decision.num_pull_tokens} tokens from {decision.pull_from}"
    if measured.num_cached_tokens is None:
        return f"{planned}; its node has not reported the prefill"
    failed = f", failed with {measured.pull_error}" if measured.pull_error else ""
    return f"{planned}; {measured.num_pulled_tokens} came in {format_ms(measured.pull_s)}{failed}"


def _prefill(measured: MeasuredRequest) -> str:
    queue_s, compute_s = measured.prefill_queue_s, measured.prefill_compute_s
    if queue_s is None or compute_s is None:
        return f"{measured.num_prompt_tokens} prompt tokens; its node has not reported the prefill"
    return (
        f"{measured.num_prompt_tokens} prompt tokens, {measured.num_cached_tokens} tokens cached; waited"
        f" {format_ms(queue_s)} on the node, computed {format_ms(compute_s)}"
    )


def _kv_moved(measured: MeasuredRequest) -> str:
    if not measured.kv_bytes:
        return "nothing"
    return f"{format_bytes(measured.kv_bytes)} over {measured.kv_transport or '?'}"


def _request(measured: MeasuredRequest) -> str:
    state = measured.state.replace("_", " ")
    end = f" ({measured.finish_reason.value})" if measured.finish_reason else ""
    after = f" after {format_ms(measured.total_s)}" if measured.total_s is not None else ""
    return (
        f"{state}{end}{after}; {format_ms(measured.queue_s)} until its first placement;"
        f" {measured.num_output_tokens} output tokens"
    )
