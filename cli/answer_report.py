"""How an answer was served, for people and for programs. Pure: values in, text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.request_report import RequestReport

if TYPE_CHECKING:
    from kvrelay.client import GenerationResult


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest of `values` that at least `fraction` of them do not exceed; NaN for none.

    Source: the nearest-rank definition.
    """
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]


def summary_lines(result: GenerationResult, state: ClusterState | None = None) -> list[str]:
    """Placement, timings as the client saw them, and KV moved. `state` adds the nodes' processes."""
    report = result.report
    attempts = "" if report.num_attempts <= 1 else f" (attempt {report.num_attempts})"
    rows = {
        "placement": f"{_place(report.prefill_node, state)} -> {_place(report.decode_node, state)}{attempts}",
        "prompt": _prompt(report),
        "output": f"{report.num_output_tokens} tokens, finished by {result.finish_reason.value}",
        "timing": _timing(result),
        "KV moved": _kv_moved(result),
    }
    return [f"  {name:<10} {text}" for name, text in rows.items()]


def result_as_json(result: GenerationResult) -> dict[str, object]:
    """All of a result, ready for `json.dumps`."""
    logprobs = [asdict(entry) if entry is not None else None for entry in result.logprobs]
    return {
        "request_id": result.request_id,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason.value,
        "report": asdict(result.report),
        "logprobs": logprobs or None,
        "ttft_s": result.ttft_s,
        "itl_s": list(result.itl_s),
        "num_continuations": result.num_continuations,
    }


def _prompt(report: RequestReport) -> str:
    pulled = f", {report.num_pulled_tokens} of these from another node" if report.num_pulled_tokens else ""
    return f"{report.num_prompt_tokens} tokens, {report.num_cached_tokens} of them cached{pulled}"


def _place(node_id: str, state: ClusterState | None) -> str:
    nodes = {node.node_id: node for node in state.nodes} if state else {}
    node = nodes.get(node_id)  # type: ignore[call-overload] # a report carries plain names
    return f"{node_id} (pid {node.pid})" if node else node_id or "?"


def _timing(result: GenerationResult) -> str:
    parts = [f"TTFT {format_ms(result.ttft_s)}"]
    if result.itl_s:
        parts.append(f"second token {format_ms(result.itl_s[0])} later")
        p50, p99 = (format_ms(percentile(result.itl_s, fraction)) for fraction in (0.5, 0.99))
        parts.append(f"ITL p50 {p50}, p99 {p99}")
        total_s = sum(result.itl_s)
        if total_s > 0:
            parts.append(f"{len(result.itl_s) / total_s:.1f} tokens/s")
    return "; ".join(parts)


def _kv_moved(result: GenerationResult) -> str:
    report = result.report
    if not report.kv_bytes:
        return "nothing"
    messages = f"{report.kv_messages} message{'' if report.kv_messages == 1 else 's'}"
    moved = f"{format_bytes(report.kv_bytes)} in {messages} over {report.kv_transport or '?'}"
    if report.kv_seconds <= 0:
        return moved
    # Most of that time the prefill was still computing, so a rate would say nothing about the transport.
    return f"{moved}, begun {format_ms(report.kv_seconds)} before it was whole, while the prefill computed"


def format_bytes(num_bytes: float) -> str:
    """``1.23 MB``: decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def format_mapping(counts: Mapping[str, int]) -> str:
    """``queued 2, decoding 1``: what is not 0."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def format_ms(seconds: float) -> str:
    """``12.3 ms``."""
    return f"{seconds * 1e3:.1f} ms"
