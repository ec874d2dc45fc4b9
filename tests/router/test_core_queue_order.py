"""Who starts first: order in the queue, who may pass whom, and how long each waits."""

from collections.abc import Callable
from typing import Any

from kvrelay.core.node_messages import NodeLoad

NewTranscript = Callable[..., Any]


def reserved(lines: list[str]) -> list[str]:
    """The prompts that a decode node was asked to take, in order."""
    return [line.split(" ", 4)[4] for line in lines if "<- reserve" in line]


def test_a_large_request_at_the_head_is_not_passed_by_small_ones(
    new_transcript: NewTranscript, say: Any
) -> None:
    transcript = new_transcript(growth_tokens=0)
    transcript.attach("p1")
    transcript.attach("d1", num_blocks=8, block_size=4)
    transcript.submit("first", stream_id=1, prompt=(1,) * 20)
    assert transcript.submit("large", stream_id=2, prompt=(2,) * 16) == []
    assert transcript.submit("small", stream_id=3, prompt=(3,)) == []
    transcript.cancel("first")
    lines = transcript.report("d1", say.released(1))
    assert reserved(lines) == [str([2] * 16), "[3]"]


def test_models_do_not_wait_for_each_other(cluster: Any) -> None:
    cluster.attach("p8", model="other")
    cluster.submit("waits", stream_id=1, model="other")
    assert reserved(cluster.submit("goes", stream_id=2)) == ["[5, 6, 7]"]


def test_continuations_come_first_and_the_oldest_of_them_before_all(cluster: Any) -> None:
    for number in range(1, 4):
        cluster.submit(f"r{number}", stream_id=number, prompt=(number,))
    cluster.lose("d1")
    cluster.submit("new", stream_id=9, prompt=(9,))
    assert reserved(cluster.attach("d2")) == ["[1]", "[2]", "[3]", "[9]"]


def test_one_that_waits_to_avoid_a_node_lets_others_pass(new_transcript: NewTranscript, say: Any) -> None:
    transcript = new_transcript()
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=2)
    transcript.submit("victim", stream_id=1, prompt=(1,))
    transcript.attach("d2", max_num_seqs=1)
    transcript.submit("fills", stream_id=2, prompt=(2,))
    assert transcript.node("d2").num_in_flight == 1
    # It failed on d1, d2 is full: it waits for d2, and d1 may serve others.
    assert transcript.report("d1", say.failed(1)) == ["p1 <- release 1"]
    assert transcript.submit("other", stream_id=3, prompt=(3,))[0] == "d1 <- reserve 3 [3]"
    transcript.cancel("fills")
    assert transcript.report("d2", say.released(2))[0] == "d2 <- reserve 4 [1]"


def test_a_load_report_right_after_a_refusal_does_not_lift_it(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.report("d1", say.refused(1))
    cluster.now_s = cluster.config.refusal_pause_s / 2
    assert cluster.report("d1", load=NodeLoad()) == []
    cluster.now_s = cluster.config.refusal_pause_s
    assert len(cluster.report("d1", load=NodeLoad())) == 2


def test_a_refused_attempt_does_not_count_against_the_limit(new_transcript: NewTranscript, say: Any) -> None:
    transcript = new_transcript(max_attempts=2)
    transcript.attach("p1", "d1")
    transcript.submit()
    for attempt in (1, 2):
        transcript.report("d1", say.refused(attempt))
        transcript.tick(2.0 * attempt)
    assert transcript.report("d1", say.failed(3))[1:] == [
        "d1 <- reserve 4 [5, 6, 7]",
        "p1 <- prefill 4 [5, 6, 7] to d1:1",
    ]
    assert transcript.report("d1", say.failed(4))[1:] == ["1.1 failed: ENGINE_FAILED"]


def test_the_wait_for_a_missing_role_runs_from_when_it_went_missing(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(node_wait_s=4.0)
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=1)
    transcript.submit("runs", stream_id=1)
    transcript.submit("waits", stream_id=2)
    transcript.tick(5.0)
    transcript.lose("d1")
    transcript.tick(7.0)
    transcript.attach("d8", model="other")
    transcript.lose("p1")
    assert transcript.tick(8.9) == []
    assert sorted(transcript.tick(9.0)) == ["1.1 failed: NODE_UNAVAILABLE", "1.2 failed: NODE_UNAVAILABLE"]


def test_the_same_events_give_the_same_effects(new_transcript: NewTranscript, say: Any) -> None:
    def play() -> list[str]:
        transcript = new_transcript()
        lines = transcript.attach("p1", "p2", "d1", "d2")
        for number in range(1, 7):
            lines += transcript.submit(f"r{number}", stream_id=number, temperature=1.0)
            lines += [repr(transcript.effects)]
        return lines + transcript.lose("d1") + transcript.lose("p1")

    assert play() == play()
