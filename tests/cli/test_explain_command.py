"""`kvrelay explain` against a scripted router, and what it shows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kvrelay.cli.explanation_view import plain_text
from kvrelay.core.explanation import Candidate
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import Role
from kvrelay.core.request import FinishReason

DONE = {
    "state": "done",
    "num_output_tokens": 3,
    "ttft_s": 0.1,
    "total_s": 1.2,
    "finish_reason": FinishReason.STOP,
    "placed_ttft_s": 0.09,
    "num_cached_tokens": 2,
    "prefill_queue_s": 0.01,
    "prefill_compute_s": 0.05,
    "kv_bytes": 4096,
    "kv_transport": "tcp",
}


def test_a_placement_is_shown_with_the_chosen_node_first(
    invoke: Any, fake_router: Any, make_explanation: Any
) -> None:
    fake_router.explanations["r1"] = make_explanation(**DONE)
    outcome = invoke("explain", "r1", "--router", fake_router.address)
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines == [
        "request r1, model tiny, router router-a: placed 1 min 5 s ago by least-ttft",
        "",
        "prefill node score queue_s prefill_s pull_s objection",
        "p2 chosen 0.08 0 0.05 0.03 -",
        "p0 0.5 0.4 0.1 - -",
        "p1 0.1 - 0.1 - it drains",
        "",
        "decode node score reserved_tokens objection",
        "d0 chosen 4096 4096 -",
        "",
        "queue_s until the node starts on it",
        "prefill_s to compute the rest",
        "pull_s to fetch what another node holds of its prefix",
        "",
        "predicted measured",
        "wait at the prefill node 0.0 ms 10.0 ms",
        "prefill 50.0 ms 50.0 ms",
        "TTFT from this placement 80.0 ms 90.0 ms",
        "",
        "placement p2 -> d0",
        "TTFT predicted 80.0 ms; measured 90.0 ms from this placement, 100.0 ms from submission",
        "prefill 7 prompt tokens, 2 tokens cached; waited 10.0 ms on the node, computed 50.0 ms",
        "KV moved 4.10 kB over tcp",
        "request done (stop) after 1200.0 ms; 2.0 ms until its first placement; 3 output tokens",
    ]


def test_a_policy_that_predicts_no_times_is_shown_as_such(make_explanation: Any) -> None:
    explanation = make_explanation(**DONE)
    blind = replace(explanation, decision=replace(explanation.decision, predicted_ttft_s=None))
    assert "TTFT       not predicted; measured 90.0 ms" in plain_text(blind)


def test_each_prediction_stands_beside_what_became_of_it(make_explanation: Any) -> None:
    explanation = make_explanation(**DONE, handoff_s=0.004, num_held_tokens=16)
    decode = Candidate(
        NodeId("d0"), Role.DECODE, 0.5, (("handoff_s", 0.003), ("itl_s", 0.5), ("held_tokens", 32.0))
    )
    prefill = Candidate(NodeId("p2"), Role.PREFILL, 0.1, (("cached_tokens", 5.0),))
    decision = replace(
        explanation.decision, candidates=(prefill, decode), pull_from=NodeId("p0"), num_pull_tokens=4
    )
    lines = [
        " ".join(line.split()) for line in plain_text(replace(explanation, decision=decision)).splitlines()
    ]
    assert "cached tokens 5 2" in lines
    assert "handoff 3.0 ms 4.0 ms" in lines
    assert "tokens not sent 32 16" in lines
    assert "gap between tokens 500.0 ms 550.0 ms" in lines
    assert "held_tokens prompt tokens whose KV need not be sent (not in the score)" in lines
    assert "pull 4 tokens from p0; 0 came in 0.0 ms" in lines


def test_what_is_not_known_yet_is_said_to_be_so(make_explanation: Any) -> None:
    text = plain_text(make_explanation())
    assert "measured not yet from this placement, not yet from submission" in text
    assert "its node has not reported the prefill" in text
    assert "KV moved   nothing" in text
    assert "prefilling; 2.0 ms until its first placement" in text
    assert "error" not in text


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        ({}, "512 tokens from p0; its node has not reported the prefill"),
        (
            {**DONE, "num_pulled_tokens": 480, "pull_s": 0.012},
            "512 tokens from p0; 480 came in 12.0 ms",
        ),
        (
            {**DONE, "pull_s": 0.5, "pull_error": "TRANSFER_TIMEOUT"},
            "512 tokens from p0; 0 came in 500.0 ms, failed with TRANSFER_TIMEOUT",
        ),
    ],
    ids=["not yet", "came", "failed"],
)
def test_a_pull_is_shown_as_planned_beside_what_came_of_it(
    make_explanation: Any, measured: dict[str, Any], text: str
) -> None:
    explanation = make_explanation(**measured)
    decision = replace(explanation.decision, pull_from=NodeId("p0"), num_pull_tokens=512)
    assert f"pull       {text}" in plain_text(replace(explanation, decision=decision)).splitlines()


def test_an_attempt_that_came_to_nothing_is_told_on_one_line(make_explanation: Any) -> None:
    error = {"error_code": "ENGINE_FAILED", "error_message": "it broke\n\x1b[2J"}
    again = plain_text(make_explanation(num_attempts=2, **error)).splitlines()
    assert "placement  p2 -> d0 (attempt 2)" in again
    assert again[-1] == r"last error ENGINE_FAILED: it broke\n\x1b[2J"
    failed = plain_text(make_explanation(state="failed", **error)).splitlines()
    assert failed[-1].startswith("error      ENGINE_FAILED")


def test_json_holds_everything_with_terms_by_name(
    invoke: Any, fake_router: Any, make_explanation: Any
) -> None:
    fake_router.explanations["r1"] = make_explanation(**DONE)
    found = json.loads(invoke("explain", "r1", "--router", fake_router.address, "--json").out)
    assert (found["request_id"], found["router_id"], found["placed_ago_s"]) == ("r1", "router-a", 65.0)
    assert found["decision"]["predicted_ttft_s"] == 0.08
    chosen = next(node for node in found["decision"]["candidates"] if node["node_id"] == "p2")
    assert chosen["terms"] == {"queue_s": 0.0, "prefill_s": 0.05, "pull_s": 0.03}
    assert chosen["role"] == "prefill"
    assert found["measured"]["finish_reason"] == "stop"
    assert found["measured"]["placed_ttft_s"] == 0.09


def test_an_unknown_id_fails_with_the_routers_words(invoke: Any, fake_router: Any) -> None:
    outcome = invoke("explain", "nope", "--router", fake_router.address, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "kvrelay: request_id 'nope' is not remembered\n"


def test_an_unknown_id_at_several_routers_names_each(invoke: Any, fake_router: Any) -> None:
    host, port = fake_router.address.split(":")
    other = f"localhost:{port}"
    outcome = invoke("explain", "nope", "-r", f"{host}:{port}", "-r", other)
    assert outcome.code == 2
    assert f"{host}:{port}: request_id 'nope'" in outcome.err
    assert f"{other}: request_id 'nope'" in outcome.err


def test_without_a_router_it_says_so(invoke: Any) -> None:
    outcome = invoke("explain", "x", "--router", "127.0.0.1:1")
    assert outcome.code == 3
    assert "127.0.0.1:1" in outcome.err
