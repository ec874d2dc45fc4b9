"""What is let in, what waits, for how long, and who is told what when it ends early."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvrelay.core.node_messages import DrainStarted, NodeLoad

NewTranscript = Callable[..., Any]


# ---- admission -------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_with_the_names_of_those_served(cluster: Any) -> None:
    assert cluster.submit(model="other") == ["1.1 failed: UNKNOWN_MODEL"]
    assert "served: m" in cluster.error().message
    assert cluster.error().field == "model"


def test_before_any_node_attached_the_answer_is_to_try_again(new_transcript: NewTranscript) -> None:
    transcript = new_transcript()
    assert transcript.submit() == ["1.1 failed: NODE_UNAVAILABLE"]
    assert transcript.error().retryable


def test_a_token_outside_the_vocabulary_is_refused(cluster: Any) -> None:
    assert cluster.submit(prompt=(1, 1000)) == ["1.1 failed: INVALID_REQUEST"]


def test_a_bias_on_a_token_outside_the_vocabulary_is_refused(cluster: Any) -> None:
    assert cluster.submit(logit_bias=((1000, 1.0),)) == ["1.1 failed: INVALID_REQUEST"]
    assert cluster.error().field == "sampling.logit_bias"
    assert len(cluster.submit(logit_bias=((999, 1.0),))) == 2


def test_a_prompt_is_refused_if_it_fills_the_context_and_taken_if_one_token_fits(cluster: Any) -> None:
    assert cluster.submit("long", prompt=(5,) * 64) == ["1.1 failed: CONTEXT_LENGTH_EXCEEDED"]
    assert len(cluster.submit("fits", prompt=(5,) * 63)) == 2


def test_a_prompt_larger_than_every_decode_nodes_pool_is_refused_at_once(
    new_transcript: NewTranscript,
) -> None:
    transcript = new_transcript()
    transcript.attach("p1")
    transcript.attach("d1", num_blocks=5)
    assert transcript.submit(prompt=(5,) * 20) == ["1.1 failed: CONTEXT_LENGTH_EXCEEDED"]
    assert len(transcript.submit(prompt=(5,) * 19)) == 2


def test_names_in_use_are_refused_and_free_again_after_the_end(cluster: Any) -> None:
    cluster.submit("a", stream_id=1)
    assert cluster.submit("a", stream_id=2) == ["1.2 failed: DUPLICATE_REQUEST"]
    assert cluster.submit("b", stream_id=1) == ["1.1 failed: DUPLICATE_REQUEST"]
    cluster.cancel("a")
    assert len(cluster.submit("a", stream_id=1)) == 2


def test_the_queue_is_bounded_and_says_when_to_come_back(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(max_queued_requests=2)
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=1)
    for number in range(3):
        transcript.submit(f"r{number}", stream_id=number)
    assert transcript.state() == {"prefilling": 1, "queued": 2}
    assert transcript.submit("r3", stream_id=3) == ["1.3 failed: OVERLOADED"]
    assert transcript.error().retry_after_s >= transcript.config.min_retry_after_s
    assert transcript.state() == {"prefilling": 1, "queued": 2}


def test_a_sampled_request_gets_one_seed_for_all_its_attempts(cluster: Any, say: Any) -> None:
    cluster.submit(temperature=1.0)
    first = cluster.effects[0].command.request.sampling.seed
    cluster.report("d1", say.failed(1))
    again = cluster.effects[1].command.request.sampling.seed
    assert first == again
    assert first is not None


def test_a_given_seed_is_kept_and_greedy_needs_none(cluster: Any) -> None:
    cluster.submit("a", temperature=1.0, seed=5)
    assert cluster.effects[0].command.request.sampling.seed == 5
    cluster.submit("b", stream_id=2)
    assert cluster.effects[0].command.request.sampling.seed is None


def test_a_clients_continuation_goes_on_where_its_output_ended(cluster: Any) -> None:
    assert cluster.submit(output=(10, 11))[0] == "d1 <- reserve 1 [5, 6, 7, 10, 11]"
    assert cluster.first_token(1, 2, 12) == ["1.1 += 12"]


@pytest.mark.parametrize(("output", "reason"), [((10, 2), "stop"), ((10, 11, 12, 13), "length")])
def test_a_clients_continuation_that_is_complete_is_finished_at_once(
    cluster: Any, output: tuple[int, ...], reason: str
) -> None:
    assert cluster.submit(output=output) == [f"1.1 finished: {reason}"]
    cluster.assert_books_empty()


# ---- waiting ---------------------------------------------------------------------------------------


def test_what_waits_starts_in_order_as_sequences_end(new_transcript: NewTranscript, say: Any) -> None:
    transcript = new_transcript()
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=1)
    for number in range(1, 4):
        transcript.submit(f"r{number}", stream_id=number, prompt=(number,), max_tokens=1)
    for number in (1, 2):
        transcript.report("p1", say.finished(number), tokens=say.batch((number, 0, (10,))))
        lines = transcript.report("d1", say.released(number))
        assert lines[0] == f"d1 <- reserve {number + 1} [{number + 1}]"


def test_blocks_are_set_aside_for_the_prompt_and_some_growth(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(growth_tokens=8)
    transcript.attach("p1")
    transcript.attach("d1", num_blocks=9, block_size=4)
    transcript.submit("a", prompt=(5,) * 8, max_tokens=100)
    assert transcript.node("d1").reserved_blocks == 4
    transcript.submit("b", stream_id=2, prompt=(5,) * 8, max_tokens=3)
    assert transcript.node("d1").reserved_blocks == 7
    assert transcript.submit("c", stream_id=3, prompt=(5,) * 9, max_tokens=1) == []


def test_one_long_prompt_is_allowed_alone_beyond_the_token_bound(
    new_transcript: NewTranscript, say: Any
) -> None:
    transcript = new_transcript(max_prefill_tokens_per_node=10)
    transcript.attach("p1", "d1")
    assert len(transcript.submit("a", prompt=(5,) * 20)) == 2
    assert transcript.submit("b", stream_id=2, prompt=(6,)) == []
    assert transcript.first_token(1)[1:] == ["d1 <- reserve 2 [6]", "p1 <- prefill 2 [6] to d1:1"]


def test_a_request_that_found_no_room_in_time_is_overloaded(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(queue_timeout_s=3.0)
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=1)
    transcript.submit("a")
    transcript.submit("b", stream_id=2)
    assert transcript.tick(2.9) == []
    assert transcript.tick(3.0) == ["1.2 failed: OVERLOADED"]


@pytest.mark.parametrize(("node_id", "missing"), [("d1", "prefill"), ("p1", "decode")])
def test_a_missing_role_is_waited_for_and_then_named(
    new_transcript: NewTranscript, node_id: str, missing: str
) -> None:
    transcript = new_transcript(node_wait_s=4.0)
    transcript.attach(node_id)
    transcript.submit()
    assert transcript.tick(3.9) == []
    assert transcript.tick(4.0) == ["1.1 failed: NODE_UNAVAILABLE"]
    assert f"no {missing} node is attached" in transcript.error().message


def test_a_role_that_comes_in_time_serves_what_waits(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(node_wait_s=4.0)
    transcript.attach("p1")
    transcript.submit()
    transcript.tick(3.9)
    assert len(transcript.attach("d1")) == 2


def test_nodes_whose_fingerprints_differ_are_never_paired_and_the_difference_is_told(
    new_transcript: NewTranscript, say: Any
) -> None:
    transcript = new_transcript(node_wait_s=4.0)
    transcript.attach("p1")
    other = replace(say.describe_node("d1").fingerprint, dtype="bfloat16")
    transcript.attach("d1", fingerprint=other)
    assert transcript.submit() == []
    assert transcript.tick(4.0) == ["1.1 failed: KV_LAYOUT_MISMATCH"]
    assert "p1 and d1: dtype: 'float32' != 'bfloat16'" in transcript.error().message
    (mismatch,) = transcript.core.status(4.0).models[0].mismatches
    assert mismatch.difference == "dtype: 'float32' != 'bfloat16'"


def test_a_deadline_ends_a_request_in_any_state_and_releases_both_nodes(cluster: Any, say: Any) -> None:
    cluster.submit(deadline_s=1.0)
    assert cluster.tick(0.9) == []
    assert cluster.tick(1.0) == ["p1 <- release 1", "d1 <- release 1", "1.1 failed: DEADLINE_EXCEEDED"]
    assert cluster.report("p1", say.released(1)) + cluster.report("d1", say.released(1)) == []
    cluster.assert_books_empty()


def test_a_deadline_that_has_passed_is_refused_and_a_far_one_is_capped(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(max_deadline_s=10.0, default_deadline_s=5.0)
    transcript.attach("p1", "d1")
    transcript.now_s = 1.0
    assert transcript.submit("late", deadline_s=1.0) == ["1.1 failed: DEADLINE_EXCEEDED"]
    transcript.submit("default", stream_id=2)
    transcript.submit("far", stream_id=3, deadline_s=1e9)
    assert "1.2 failed: DEADLINE_EXCEEDED" in transcript.tick(6.0)
    assert "1.3 failed: DEADLINE_EXCEEDED" in transcript.tick(11.0)


# ---- refusals --------------------------------------------------------------------------------------


def test_a_node_that_refused_gets_nothing_until_its_next_load_report(cluster: Any, say: Any) -> None:
    cluster.submit()
    assert cluster.report("d1", say.refused(1), load=NodeLoad()) == ["p1 <- release 1"]
    cluster.report("p1", say.released(1))
    assert cluster.tick(0.5) == []
    assert cluster.report("d1", load=NodeLoad()) == [
        "d1 <- reserve 2 [5, 6, 7]",
        "p1 <- prefill 2 [5, 6, 7] to d1:1",
    ]


def test_a_node_that_refused_and_says_no_more_is_tried_again_after_a_while(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.report("d1", say.refused(1))
    assert len(cluster.tick(cluster.config.max_refusal_pause_s)) == 2


def test_refusals_do_not_use_up_attempts_but_the_queue_times_out(
    new_transcript: NewTranscript, say: Any
) -> None:
    transcript = new_transcript(max_attempts=1, queue_timeout_s=5.0)
    transcript.attach("p1", "d1")
    transcript.submit()
    for attempt in range(1, 5):
        transcript.report("d1", say.refused(attempt))
        transcript.report("p1", say.released(attempt))
        assert len(transcript.tick(float(attempt))) == 2
    transcript.report("d1", say.refused(5))
    assert transcript.tick(5.0) == ["1.1 failed: OVERLOADED"]
    assert "no room" in transcript.error().message


def test_a_refusal_sends_the_request_to_another_node_at_once(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.attach("d2")
    assert cluster.report("d1", say.refused(1))[1] == "d2 <- reserve 2 [5, 6, 7]"


@pytest.mark.parametrize("node_id", ["p1", "d1"])
def test_what_is_the_callers_fault_is_told_with_its_field_and_holds_nothing_against_the_node(
    cluster: Any, say: Any, node_id: str
) -> None:
    other = "d1" if node_id == "p1" else "p1"
    cluster.submit()
    refused = say.refused(1, "INVALID_REQUEST", "sampling.grammar")
    assert cluster.report(node_id, refused) == [f"{other} <- release 1", "1.1 failed: INVALID_REQUEST"]
    assert (cluster.error().field, cluster.error().message) == ("sampling.grammar", "no room")
    cluster.report(other, say.released(1))
    cluster.assert_books_empty()
    assert len(cluster.submit("next")) == 2, "the node takes other requests at once"


# ---- cancelled, gone, drained ----------------------------------------------------------------------


def test_a_queued_request_is_cancelled_without_a_word_to_any_node(new_transcript: NewTranscript) -> None:
    transcript = new_transcript()
    transcript.attach("p1")
    transcript.submit()
    assert transcript.cancel() == ["1.1 failed: CANCELLED"]
    transcript.assert_books_empty()


def test_cancelling_an_unknown_request_does_nothing(cluster: Any) -> None:
    assert cluster.cancel("nobody") == []


def test_a_closed_session_takes_all_its_requests_along_and_hears_nothing(cluster: Any, say: Any) -> None:
    cluster.submit("a", session=1, stream_id=1)
    cluster.submit("b", session=1, stream_id=2)
    cluster.submit("c", session=2, stream_id=1)
    lines = cluster.close_session(1)
    assert sorted(lines) == ["d1 <- release 1", "d1 <- release 2", "p1 <- release 1", "p1 <- release 2"]
    assert cluster.first_token(1) == []
    assert cluster.first_token(3) == ["2.1 += 10"]


def test_a_draining_node_gets_nothing_new_and_finishes_what_it_has(cluster: Any, say: Any) -> None:
    cluster.submit("a")
    cluster.report("d1", DrainStarted())
    assert cluster.submit("b", stream_id=2) == []
    assert cluster.first_token(1) == ["1.1 += 10"]
    assert cluster.attach("d2")[0] == "d2 <- reserve 2 [5, 6, 7]"
    cluster.verify(1)
    assert cluster.tokens("d1", 1, 1, 11) == ["1.1 += 11"]


def test_when_all_nodes_of_a_role_drain_the_refusal_says_so(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(node_wait_s=4.0)
    transcript.attach("p1", "d1")
    transcript.report("d1", DrainStarted())
    transcript.submit()
    transcript.tick(4.0)
    assert "every decode node" in transcript.error().message


# ---- nodes come and go -----------------------------------------------------------------------------


def test_a_node_that_attaches_anew_lost_all_it_had(cluster: Any) -> None:
    cluster.submit()
    lines = cluster.attach("d1", incarnation=2)
    assert lines == ["p1 <- release 1", "d1 <- reserve 2 [5, 6, 7]", "p1 <- prefill 2 [5, 6, 7] to d1:1"]


def test_the_end_of_an_earlier_stream_does_not_touch_the_new_one(cluster: Any) -> None:
    cluster.attach("d1", incarnation=2)
    cluster.submit()
    assert cluster.lose("d1", incarnation=1) == []
    assert cluster.state() == {"prefilling": 1}


def test_a_node_that_cannot_be_used_is_turned_away(new_transcript: NewTranscript) -> None:
    transcript = new_transcript()
    transcript.attach("p1", block_size=0)
    transcript.attach("d1", transfer_address="")
    assert transcript.core.status(0.0).nodes == ()
    assert transcript.core.status(0.0).counters.num_nodes_turned_away == 2


def test_a_model_is_forgotten_some_time_after_its_last_node_left(cluster: Any) -> None:
    cluster.attach("p9", model="other")
    cluster.lose("p9")
    assert len(cluster.core.status(0.0).models) == 2
    cluster.tick(cluster.config.node_wait_s + 0.1)
    assert cluster.submit(model="other") == ["1.1 failed: UNKNOWN_MODEL"]


def test_a_release_that_is_never_answered_is_counted_and_struck_when_the_lease_ends(
    new_transcript: NewTranscript,
) -> None:
    transcript = new_transcript(ack_timeout_s=2.0, lease_s=6.0)
    transcript.attach("p1", "d1")
    transcript.submit()
    transcript.cancel()
    transcript.tick(2.0)
    assert transcript.node("d1").num_overdue == 1
    assert transcript.node("d1").reserved_blocks > 0
    assert transcript.core.status(2.0).counters.num_overdue_releases == 2
    transcript.tick(5.9)
    assert transcript.state() == {"failed": 1}
    transcript.tick(6.0)
    transcript.assert_books_empty()
