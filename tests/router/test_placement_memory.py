"""What the core remembers of a placement: the decision, and what was measured of the request since."""

from collections.abc import Callable
from typing import Any

import pytest

from kvrelay.core.errors import UnknownRequest
from kvrelay.core.request import FinishReason

NewTranscript = Callable[..., Any]


def explain(transcript: Any, request_id: str = "r") -> Any:
    return transcript.core.explain(request_id, transcript.now_s)


def refusal(transcript: Any, request_id: str) -> UnknownRequest:
    with pytest.raises(UnknownRequest) as caught:
        explain(transcript, request_id)
    assert caught.value.field == "request_id"
    return caught.value


def test_a_placement_shows_all_candidates_with_the_terms_of_their_scores(cluster: Any) -> None:
    cluster.attach("p2", "d2", max_model_len=4)
    cluster.submit(prompt=(5, 6, 7, 8))
    cluster.now_s = 2.5
    found = explain(cluster)
    assert (found.request_id, found.model, found.placed_ago_s) == ("r", "m", 2.5)
    decision = found.decision
    assert (decision.prefill_node, decision.decode_node, decision.policy) == ("p1", "d1", "least-loaded")
    assert decision.predicted_ttft_s is None, "that policy predicts no times"
    candidates = {candidate.node_id: candidate for candidate in decision.candidates}
    assert list(candidates) == ["p1", "p2", "d1", "d2"]
    assert candidates["p1"].terms == (("outstanding_tokens", 0.0), ("new_tokens", 4.0))
    assert candidates["d1"].terms == (("reserved_share", 0.0), ("new_share", 2 / 32))
    assert candidates["p1"].objection == candidates["d1"].objection == ""
    assert "4 tokens" in candidates["p2"].objection


def test_what_is_measured_grows_while_the_request_lives(cluster: Any) -> None:
    cluster.submit()
    cluster.now_s = 0.25
    measured = explain(cluster).measured
    assert (measured.state, measured.num_attempts, measured.queue_s) == ("prefilling", 1, 0.0)
    assert measured.ttft_s is measured.placed_ttft_s is measured.num_cached_tokens is measured.total_s is None
    cluster.first_token()
    cluster.now_s = 0.5
    measured = explain(cluster).measured
    assert (measured.state, measured.ttft_s, measured.placed_ttft_s) == ("handing_off", 0.25, 0.25)
    assert (measured.num_cached_tokens, measured.prefill_queue_s, measured.prefill_compute_s) == (1, 0.0, 0.1)
    assert (measured.kv_bytes, measured.kv_transport) == (0, "")
    cluster.verify()
    cluster.tokens("d1", 1, 1, 11)
    measured = explain(cluster).measured
    assert (measured.state, measured.num_output_tokens, measured.total_s) == ("decoding", 2, None)
    assert (measured.kv_bytes, measured.kv_seconds, measured.kv_transport) == (100, 0.01, "memory")


def test_what_was_measured_is_kept_after_the_end(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.now_s = 0.25
    cluster.first_token()
    cluster.verify()
    cluster.now_s = 1.0
    cluster.report("d1", say.finished(1, FinishReason.STOP), tokens=say.batch((1, 1, (11, 2))))
    cluster.now_s = 60.0
    found = explain(cluster)
    measured = found.measured
    assert found.placed_ago_s == 60.0
    assert (measured.state, measured.finish_reason, measured.error_code) == ("done", FinishReason.STOP, "")
    assert (measured.ttft_s, measured.placed_ttft_s, measured.total_s) == (0.25, 0.25, 1.0)
    assert (measured.num_prompt_tokens, measured.num_output_tokens, measured.num_cached_tokens) == (3, 3, 1)
    assert measured.kv_bytes == 100


def test_a_continuation_replaces_the_placement_and_counts_its_own_first_token(cluster: Any) -> None:
    cluster.submit()
    cluster.now_s = 0.25
    cluster.first_token()
    cluster.lose("d1")
    waiting = explain(cluster)
    assert (waiting.measured.state, waiting.measured.num_attempts) == ("queued", 1)
    assert waiting.measured.placed_ttft_s == 0.25, "the attempt that came to nothing is the latest still"
    assert waiting.measured.error_code == "NODE_UNAVAILABLE"
    cluster.now_s = 1.0
    cluster.attach("d2")
    placed = explain(cluster)
    assert (placed.decision.decode_node, placed.placed_ago_s) == ("d2", 0.0)
    assert (placed.measured.ttft_s, placed.measured.placed_ttft_s) == (0.25, None)
    assert placed.measured.num_cached_tokens is None
    cluster.now_s = 1.5
    cluster.first_token(attempt=2, index=1, token_id=11)
    measured = explain(cluster).measured
    assert (measured.ttft_s, measured.placed_ttft_s, measured.num_attempts) == (0.25, 0.5, 2)
    assert "d1 was lost" in measured.error_message, "why there was a second attempt"


@pytest.mark.parametrize(("end", "code"), [("cancel", "CANCELLED"), ("close_session", "CANCELLED")])
def test_a_request_that_nobody_wants_any_more_is_remembered_as_failed(
    cluster: Any, end: str, code: str
) -> None:
    cluster.submit()
    cluster.now_s = 0.5
    getattr(cluster, end)()
    measured = explain(cluster).measured
    assert (measured.state, measured.error_code, measured.total_s) == ("failed", code, 0.5)
    assert measured.finish_reason is None
    assert measured.ttft_s is None


def test_the_error_that_ended_a_request_stands_in_place_of_earlier_ones(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.report("p1", say.failed(1))
    cluster.now_s = 0.5
    cluster.tick(0.5)
    cluster.report("p1", say.failed(2, "INVALID_REQUEST"))
    measured = explain(cluster).measured
    assert (measured.state, measured.num_attempts, measured.error_code) == ("failed", 2, "INVALID_REQUEST")


def test_time_in_the_queue_is_not_the_placements_but_is_the_requests(new_transcript: NewTranscript) -> None:
    transcript = new_transcript()
    transcript.attach("p1", "d1", max_num_seqs=1)
    transcript.submit("first")
    transcript.submit("second", stream_id=2)
    assert "has not been placed yet" in refusal(transcript, "second").message
    transcript.now_s = 2.0
    transcript.lose("d1")
    transcript.attach("d2")
    transcript.now_s = 3.0
    transcript.first_token(attempt=3)
    measured = explain(transcript, "second").measured
    assert (measured.queue_s, measured.ttft_s, measured.placed_ttft_s) == (2.0, 3.0, 1.0)


def test_an_id_that_is_used_again_is_explained_by_its_latest_request(new_transcript: NewTranscript) -> None:
    transcript = new_transcript()
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=1)
    transcript.submit()
    transcript.cancel()
    transcript.now_s = 1.0
    transcript.submit()
    assert "has not been placed yet" in refusal(transcript, "r").message, "d1 has yet to let the first go"
    transcript.cancel()
    assert explain(transcript).measured.total_s == 0.0, "what remains is the one that was placed"


def test_as_many_requests_are_remembered_as_configured(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(num_remembered_decisions=2)
    transcript.attach("p1", "d1")
    for number in range(3):
        transcript.submit(f"r{number}", stream_id=number)
    message = refusal(transcript, "r0").message
    assert "'r0'" in message
    assert "latest 2 requests" in message
    transcript.cancel("r0")
    assert "latest 2 requests" in refusal(transcript, "r0").message, "its end does not bring it back"
    assert explain(transcript, "r1").decision.decode_node == "d1"
    assert explain(transcript, "r2").decision.decode_node == "d1"


def test_nothing_is_remembered_where_nothing_is_to_be(new_transcript: NewTranscript) -> None:
    transcript = new_transcript(num_remembered_decisions=0)
    transcript.attach("p1", "d1")
    transcript.submit()
    assert "latest 0 requests" in refusal(transcript, "r").message
    transcript.cancel()


def test_a_request_that_was_never_placed_is_unknown(cluster: Any) -> None:
    cluster.submit(output=(10, 11, 12, 13))
    assert "has 0" in refusal(cluster, "r").message
