"""The policy `kvrelay` inside the core: what nodes say moves prompts, and nobody is left waiting."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import DrainStarted, NodeLoad
from kvrelay.router.block_keys import PromptBlocks
from kvrelay.router.events import LookDue

PROMPT = tuple(range(5, 45))
"""Ten full blocks of 4 tokens."""


@pytest.fixture
def cluster(new_transcript: Any) -> Any:
    transcript = new_transcript(placement="kvrelay")
    transcript.attach("p1", "p2", "p3", "d1", max_num_seqs=16, num_blocks=400)
    return transcript


def keys(say: Any, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    digest = say.describe_node("p1").fingerprint.digest
    of_prompt: list[int] = PromptBlocks(prompt).keys(4, digest).tolist()
    return of_prompt


def snapshot(*held: int) -> KVEvent:
    return KVEvent(1, 0, KVChanges(stored=held, cleared=True))


def prefill_node(lines: list[str]) -> str:
    """The node that was told to prefill."""
    return next(line.split()[0] for line in lines if " <- prefill " in line)


def finish(cluster: Any, node_id: str, attempt: int) -> None:
    """It is computed, and its caller wants no more."""
    cluster.first_token(attempt, node_id=node_id)
    cluster.cancel(f"r{attempt}")


def test_a_prompt_goes_where_its_prefix_is_said_to_be(cluster: Any, say: Any) -> None:
    for node_id in ("p1", "p2", "p3", "d1"):
        cluster.report(node_id, kv=snapshot(*(keys(say) if node_id == "p2" else ())))
    assert prefill_node(cluster.submit("r1", PROMPT)) == "p2"
    finish(cluster, "p2", 1)
    cluster.report("p2", kv=KVEvent(1, 1, KVChanges(removed=keys(say))))
    cluster.report("p3", kv=KVEvent(1, 1, KVChanges(stored=keys(say))))
    assert prefill_node(cluster.submit("r2", PROMPT, stream_id=2)) == "p3"


def test_while_events_are_missing_a_prompt_goes_where_its_like_went_before(cluster: Any) -> None:
    for group in range(4):
        prompt = tuple(range(100 * group + 5, 100 * group + 45))
        attempts = [2 * group + 1, 2 * group + 2]
        chosen = []
        for attempt in attempts:
            cluster.now_s += 1.0
            lines = cluster.submit(f"r{attempt}", prompt, stream_id=attempt)
            chosen.append(prefill_node(lines))
            finish(cluster, chosen[-1], attempt)
        assert chosen[0] == chosen[1]


@pytest.fixture
def busy(new_transcript: Any) -> Any:
    """All three prefill nodes compute a long prompt."""
    transcript = new_transcript(placement="kvrelay")
    transcript.attach("p1", "p2", "p3", "d1", max_num_seqs=16, num_blocks=16_000, max_model_len=16_000)
    for number in (1, 2, 3):
        prompt = tuple((number * 31 + place) % 900 for place in range(8000))
        assert any(
            " <- prefill " in line for line in transcript.submit(f"r{number}", prompt, stream_id=number)
        )
    return transcript


LONG = tuple(place % 700 for place in range(6000))


def test_a_prompt_that_waits_is_sent_shortly_before_a_node_is_idle(busy: Any) -> None:
    assert busy.submit("r4", LONG, stream_id=4) == []
    look_s = busy.core.look_again_s
    assert 0.0 < look_s < math.inf
    busy.now_s = 0.5 * look_s
    assert busy.handle(LookDue()) == []
    lines: list[str] = []
    for _ in range(5):
        if not lines:
            busy.now_s = busy.core.look_again_s
            lines = busy.handle(LookDue())
    assert prefill_node(lines) in ("p1", "p2", "p3")
    assert busy.core.look_again_s == math.inf, "nobody waits"


def test_short_prompts_are_sent_ahead_to_be_computed_together(busy: Any) -> None:
    assert busy.submit("r4", LONG, stream_id=4) == []
    busy.now_s = 0.21
    sent = [busy.submit(f"s{number}", (5, 6, 7 + number), stream_id=10 + number) for number in range(20)]
    num_sent = sum(any(" <- prefill " in line for line in lines) for lines in sent)
    assert 0 < num_sent < 20, "some, but no more than share a step"


def test_a_report_lets_the_next_prompt_start(busy: Any) -> None:
    assert busy.submit("r4", LONG, stream_id=4) == []
    busy.now_s = 0.1
    assert prefill_node(busy.first_token(2, node_id="p2")) == "p2"


def test_a_prompt_that_waits_for_a_node_that_drains_or_is_lost_goes_elsewhere(busy: Any, say: Any) -> None:
    busy.now_s = 0.1
    digest = say.describe_node("p1").fingerprint.digest
    held = PromptBlocks(LONG).keys(4, digest).tolist()
    busy.report("p3", kv=snapshot(*held[:2000]))
    assert busy.submit("r4", LONG, stream_id=4) == []
    busy.report("p3", DrainStarted())
    assert prefill_node(busy.first_token(1, node_id="p1")) == "p1"


def test_a_refused_prompt_is_tried_again_as_soon_as_its_node_may_be_asked(
    new_transcript: Any, say: Any
) -> None:
    cluster = new_transcript(placement="kvrelay")
    cluster.attach("p1", "d1")
    cluster.submit()
    cluster.report("p1", say.refused(1))
    assert cluster.tick(0.01) == []
    cluster.now_s = 0.03
    lines = cluster.report("p1", load=NodeLoad())
    assert any(" <- prefill " in line for line in lines)
