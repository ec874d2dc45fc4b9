"""Figures as people read them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvrelay.cli.answer_report import format_bytes, percentile, result_as_json, summary_lines
from kvrelay.cli.status_view import format_duration, plain_text, state_as_json
from kvrelay.client import GenerationResult
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.request import FinishReason
from kvrelay.core.request_report import RequestReport


def make_result(
    kv_bytes: int = 2_000_000, kv_seconds: float = 0.004, num_attempts: int = 1
) -> GenerationResult:
    report = RequestReport(
        "p0", "d0", num_attempts, 40, 5, 16, 0.0, 0.04, 0.2, kv_bytes, 1, kv_seconds, "ucx"
    )
    itl_s = (0.010, 0.012, 0.011, 0.030)
    return GenerationResult(
        "id", "hi", (1, 2, 3, 4, 5), FinishReason.LENGTH, report, (), 0.05, itl_s, 0.2, 0, 0, "a"
    )


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [([1.0], 0.5, 1.0), ([3.0, 1.0, 2.0], 0.5, 2.0), (list(range(1, 101)), 0.99, 99), ([1.0, 2.0], 0.0, 1.0)],
)
def test_percentile_is_the_nearest_rank(values: list[float], fraction: float, expected: float) -> None:
    assert percentile(values, fraction) == expected


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 0.5))


def test_summary_names_processes_timings_and_kv(make_state: Callable[[], ClusterState]) -> None:
    text = "\n".join(summary_lines(make_result(), make_state()))
    assert "p0 (pid 11) -> d0 (pid 12)" in text
    assert "40 tokens, 16 of them cached" in text
    assert "TTFT 50.0 ms; second token 10.0 ms later; ITL p50 11.0 ms, p99 30.0 ms; 63.5 tokens/s" in text
    assert "2.00 MB in 1 message over ucx, begun 4.0 ms before it was whole" in text


def test_summary_says_when_nothing_moved_and_when_it_took_several_attempts() -> None:
    text = "\n".join(summary_lines(make_result(kv_bytes=0, num_attempts=3)))
    assert "KV moved   nothing" in text
    assert "p0 -> d0 (attempt 3)" in text


def test_summary_tells_what_came_from_another_node() -> None:
    result = make_result()
    result = replace(result, report=replace(result.report, num_pulled_tokens=8))
    assert "40 tokens, 16 of them cached, 8 of these from another node" in "\n".join(summary_lines(result))


def test_json_of_a_result_can_be_written() -> None:
    assert json.loads(json.dumps(result_as_json(make_result())))["token_ids"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2.5e9, "2.50 GB"), (5e12, "5000.00 GB")],
)
def test_bytes_take_decimal_units(amount: float, text: str) -> None:
    assert format_bytes(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90000, "1 d 1 h"), (-1, "0 s")],
)
def test_durations_take_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_an_empty_cluster_says_that_no_node_is_attached() -> None:
    assert "no nodes are attached" in plain_text(ClusterState(router_id="r"), ())


def test_json_of_a_state_can_be_written(make_state: Callable[[], ClusterState]) -> None:
    assert json.loads(json.dumps(state_as_json(make_state(), ())))["counters"]["requests"] == 5
