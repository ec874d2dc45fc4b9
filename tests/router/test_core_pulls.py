"""A pull that a decision wants: who is told what, and what lets go of the holder's pins, whatever happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvrelay.core.ids import AttemptId, RequestId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.node_messages import DrainStarted, KVReleased, PrefillFinished
from kvrelay.router.metrics import RouterMetrics
from kvrelay.router.state_report import cluster_state

from .pulling_policy import OrdersPulls

if TYPE_CHECKING:
    from .conftest import Transcript

PULLED = PrefillFinished(AttemptId(1), 2, 0.0, 0.1, num_pulled_tokens=2, pull_s=0.05)
NOT_PULLED = PrefillFinished(AttemptId(1), 0, 0.0, 0.1, pull_s=0.05, pull_error="TRANSFER_FAILED")
BEGINS = ["d1 <- reserve 1 [5, 6, 7]", "p1 <- prefill 1 [5, 6, 7] to d1:1, 2 tokens as 2"]


@pytest.fixture
def pulling(new_transcript: Any) -> Transcript:
    """p1 prefills for d1, and is to pull two tokens from p2, which is too busy to prefill."""
    return make(new_transcript, OrdersPulls("p2", 2))


def make(new_transcript: Any, policy: OrdersPulls, **config: object) -> Transcript:
    transcript: Transcript = new_transcript(policy, **config)
    transcript.attach("p1", transfer_address="p1:1")
    transcript.attach("d1")
    transcript.attach("p2", transfer_address="p2:1", max_model_len=2)
    return transcript


def pulled(transcript: Transcript, say: Any, report: PrefillFinished = PULLED) -> list[str]:
    """The prefill node has computed the prompt."""
    return transcript.report("p1", report, tokens=say.batch((1, 0, (10,))))


def test_the_holder_sends_and_the_prefill_node_pulls_under_an_id_of_its_own(
    pulling: Transcript, say: Any
) -> None:
    assert pulling.submit() == ["p2 <- send 2 [5, 6] to p1:1", *BEGINS]
    assert pulling.report("p2", say.released(2)) == []
    assert pulled(pulling, say) == ["1.1 += 10"]
    pulling.verify()
    assert pulling.report("d1", say.finished(1)) == ["1.1 finished: length"]
    pulling.assert_books_empty()
    counters = pulling.core.status(0.0).counters
    assert (counters.num_pulls, counters.num_pulls_failed, counters.num_pulled_tokens) == (1, 0, 2)


def test_the_report_and_the_explanation_tell_what_was_pulled(pulling: Transcript, say: Any) -> None:
    pulling.submit()
    pulling.report("p2", say.released(2))
    pulled(pulling, say)
    pulling.verify()
    pulling.report("d1", say.finished(1))
    [finished] = pulling.effects
    assert finished.report.num_pulled_tokens == 2  # type: ignore[union-attr]
    explanation = pulling.core.explain(RequestId("r"), 1.0)
    assert (explanation.decision.pull_from, explanation.decision.num_pull_tokens) == ("p2", 2)
    measured = explanation.measured
    assert (measured.num_pulled_tokens, measured.pull_s, measured.pull_error) == (2, 0.05, "")


def test_metrics_count_pulls_and_what_came_of_them(pulling: Transcript, say: Any) -> None:
    pulling.submit()
    pulling.report("p2", say.released(2))
    pulled(pulling, say)
    metrics = RouterMetrics()
    metrics.watch(lambda: cluster_state(pulling.core.status(0.0), "router", 0.0))
    lines = metrics.exposition().decode().splitlines()
    for line in (
        "kvrelay_pulls_total 1.0",
        "kvrelay_pulls_failed_total 0.0",
        "kvrelay_pulled_tokens_total 2.0",
    ):
        assert line in lines


def test_a_decode_node_may_be_the_holder_even_the_attempts_own(new_transcript: Any, say: Any) -> None:
    transcript = make(new_transcript, OrdersPulls("d1", 2))
    assert transcript.submit() == ["d1 <- send 2 [5, 6] to p1:1", *BEGINS]
    assert transcript.report("d1", say.released(2)) == []
    pulled(transcript, say)
    transcript.verify()
    transcript.report("d1", say.finished(1))
    transcript.assert_books_empty()


@pytest.mark.parametrize("outcome", ["refused", "failed"])
def test_a_holder_that_cannot_send_stops_the_pull(pulling: Transcript, say: Any, outcome: str) -> None:
    pulling.submit()
    report = say.refused(2) if outcome == "refused" else say.failed(2, "TRANSFER_FAILED")
    assert pulling.report("p2", report) == ["p1 <- stop pull 1"]
    assert pulled(pulling, say, NOT_PULLED) == ["1.1 += 10"]
    assert pulling.core.status(0.0).counters.num_pulls_failed == 1
    assert pulling.state() == {"handing_off": 1}


def test_a_lost_holder_stops_the_pull_and_costs_the_request_nothing_else(
    pulling: Transcript, say: Any
) -> None:
    pulling.submit()
    assert pulling.lose("p2") == ["p1 <- stop pull 1"]
    pulled(pulling, say, NOT_PULLED)
    pulling.verify()
    pulling.report("d1", say.finished(1))
    pulling.assert_books_empty()
    assert pulling.core.status(0.0).counters.num_attempts_failed == 0


def test_a_refused_send_says_nothing_of_room_for_prompts(pulling: Transcript, say: Any) -> None:
    pulling.submit()
    pulling.report("p2", say.refused(2))
    assert not pulling.node("p2").is_full  # type: ignore[attr-defined]


def test_when_the_prefill_is_computed_nobody_waits_for_the_pull_any_more(
    pulling: Transcript, say: Any
) -> None:
    pulling.submit()
    assert pulled(pulling, say, NOT_PULLED) == ["1.1 += 10", "p2 <- release 2"]
    assert pulling.report("p2", say.failed(2)) == []
    pulling.verify()
    pulling.report("d1", say.finished(1))
    pulling.assert_books_empty()


@pytest.mark.parametrize("how", ["cancelled", "client gone", "deadline", "satisfied"])
def test_the_end_of_the_request_releases_all_three_nodes(pulling: Transcript, say: Any, how: str) -> None:
    pulling.submit(deadline_s=5.0)
    ends = {
        "cancelled": pulling.cancel,
        "client gone": pulling.close_session,
        "deadline": lambda: pulling.tick(5.0),
        "satisfied": pulling.satisfy,
    }
    lines = ends[how]()
    assert [line for line in lines if "<-" in line] == [
        "p1 <- release 1",
        "d1 <- release 1",
        "p2 <- release 2",
    ]
    assert pulling.core.status(5.0).num_unsettled_attempts == 2
    for node_id, attempt in (("p1", 1), ("d1", 1), ("p2", 2)):
        pulling.report(node_id, say.released(attempt))
    pulling.assert_books_empty()


def test_a_lost_prefill_node_releases_the_holder_and_the_request_goes_on(
    pulling: Transcript, say: Any
) -> None:
    pulling.submit()
    pulling.attach("p3", transfer_address="p3:1")
    assert pulling.lose("p1") == [
        "d1 <- release 1",
        "p2 <- release 2",
        "p2 <- send 4 [5, 6] to p3:1",
        "d1 <- reserve 3 [5, 6, 7]",
        "p3 <- prefill 3 [5, 6, 7] to d1:1, 2 tokens as 4",
    ]
    pulling.report("p2", say.released(2))
    pulling.cancel()
    for node_id, attempt in (("d1", 1), ("d1", 3), ("p3", 3), ("p2", 4)):
        pulling.report(node_id, say.released(attempt))
    pulling.assert_books_empty()


def test_a_holder_that_does_not_answer_its_release_is_overdue_and_then_written_off(
    new_transcript: Any, say: Any
) -> None:
    transcript = make(new_transcript, OrdersPulls("p2", 2), ack_timeout_s=1.0, lease_s=3.0)
    transcript.submit()
    transcript.cancel()
    for node_id in ("p1", "d1"):
        transcript.report(node_id, say.released(1))
    transcript.tick(1.0)
    assert transcript.node("p2").num_overdue == 1  # type: ignore[attr-defined]
    assert transcript.core.status(1.0).num_unsettled_attempts == 1
    transcript.tick(3.0)
    assert transcript.core.status(3.0).counters.num_expired_holds == 1
    transcript.assert_books_empty()
    assert transcript.report("p2", KVReleased(AttemptId(2))) == []


@pytest.mark.parametrize(
    ("holder", "num_tokens"), [("p1", 2), ("p7", 2), ("p2", 0)], ids=["itself", "nobody", "no tokens"]
)
def test_a_pull_that_makes_no_sense_is_not_ordered(
    new_transcript: Any, say: Any, holder: str, num_tokens: int
) -> None:
    transcript = make(new_transcript, OrdersPulls(holder, num_tokens))
    assert transcript.submit() == ["d1 <- reserve 1 [5, 6, 7]", "p1 <- prefill 1 [5, 6, 7] to d1:1"]
    assert transcript.core.status(0.0).counters.num_pulls == 0


def test_no_more_is_pulled_than_the_prompt_has(new_transcript: Any) -> None:
    assert make(new_transcript, OrdersPulls("p2", 9)).submit()[0] == "p2 <- send 2 [5, 6, 7] to p1:1"


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": KVFingerprint("other", "float32", 2, 1, 4, "rope")},
        {"transport": "ucx"},
    ],
    ids=["fingerprint", "transport"],
)
def test_nodes_that_cannot_exchange_kv_are_not_asked_to(new_transcript: Any, change: Any) -> None:
    transcript = new_transcript(OrdersPulls("p2", 2))
    transcript.attach("p1", transfer_address="p1:1")
    transcript.attach("d1")
    transcript.attach("p2", transfer_address="p2:1", max_model_len=2, **change)
    assert transcript.submit() == ["d1 <- reserve 1 [5, 6, 7]", "p1 <- prefill 1 [5, 6, 7] to d1:1"]


def test_nothing_is_sent_to_a_prefill_node_that_takes_nothing(new_transcript: Any) -> None:
    transcript = new_transcript(OrdersPulls("p2", 2))
    transcript.attach("p1", "d1")
    transcript.attach("p2", max_model_len=2)
    assert transcript.submit() == ["d1 <- reserve 1 [5, 6, 7]", "p1 <- prefill 1 [5, 6, 7] to d1:1"]


def test_a_node_that_drains_is_not_asked_to_send(pulling: Transcript, say: Any) -> None:
    pulling.report("p2", DrainStarted())
    assert pulling.submit() == ["d1 <- reserve 1 [5, 6, 7]", "p1 <- prefill 1 [5, 6, 7] to d1:1"]


def test_sends_do_not_count_as_sequences_that_a_decode_node_decodes(new_transcript: Any, say: Any) -> None:
    transcript = new_transcript(OrdersPulls("d1", 2))
    transcript.attach("p1", transfer_address="p1:1")
    transcript.attach("d1", max_num_seqs=2)
    for number in (1, 2):
        transcript.submit(f"r{number}", stream_id=number)
    assert transcript.state() == {"prefilling": 2}
    assert transcript.node("d1").num_in_flight == 4  # type: ignore[attr-defined]
