"""How a request goes when nothing fails, and what each fault does in each state. `p1`, `d1`: the pair."""

from collections.abc import Callable
from typing import Any

import pytest

from kvrelay.core.request import FinishReason
from kvrelay.core.sampling import Grammar, GrammarKind

DISPATCH = ["d1 <- reserve 1 [5, 6, 7]", "p1 <- prefill 1 [5, 6, 7] to d1:1"]
SECOND = ["d1 <- reserve 2 [5, 6, 7, 10]", "p1 <- prefill 2 [5, 6, 7, 10] to d1:1"]


def test_a_request_from_submission_to_settled(cluster: Any, say: Any) -> None:
    assert cluster.submit() == DISPATCH
    assert cluster.state() == {"prefilling": 1}
    assert cluster.first_token() == ["1.1 += 10"]
    assert cluster.state() == {"handing_off": 1}
    assert cluster.verify() == []
    assert cluster.state() == {"decoding": 1}
    assert cluster.tokens("d1", 1, 1, 11) == ["1.1 += 11"]
    last = say.batch((1, 2, (12, 13)))
    assert cluster.report("d1", say.finished(1), tokens=last) == ["1.1 += 12 13", "1.1 finished: length"]
    cluster.assert_books_empty()


def test_the_final_report_says_where_and_how_fast(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.now_s = 0.25
    cluster.first_token()
    cluster.verify()
    cluster.now_s = 1.0
    cluster.report("d1", say.finished(1, FinishReason.STOP), tokens=say.batch((1, 1, (11, 2))))
    report = cluster.effects[-1].report
    assert (report.prefill_node, report.decode_node, report.num_attempts) == ("p1", "d1", 1)
    assert (report.num_prompt_tokens, report.num_output_tokens, report.num_cached_tokens) == (3, 3, 1)
    assert (report.queue_s, report.ttft_s, report.total_s) == (0.0, 0.25, 1.0)
    assert (report.kv_bytes, report.kv_messages, report.kv_transport) == (100, 2, "memory")


def test_a_first_token_that_is_the_last_releases_the_decode_node(cluster: Any, say: Any) -> None:
    cluster.submit(max_tokens=1)
    lines = cluster.report("p1", say.finished(1), tokens=say.batch((1, 0, (10,))))
    assert lines == ["1.1 += 10", "d1 <- release 1", "1.1 finished: length"]
    assert cluster.state() == {"done": 1}
    cluster.report("d1", say.released(1))
    cluster.assert_books_empty()


def test_a_transfer_that_its_prefill_node_gave_up_waits_for_that_nodes_word(cluster: Any, say: Any) -> None:
    cluster.submit(max_tokens=1)
    assert cluster.report("d1", say.failed(1, "TRANSFER_CANCELLED")) == []
    assert cluster.state() == {"prefilling": 1}
    lines = cluster.report("p1", say.finished(1), tokens=say.batch((1, 0, (10,))))
    assert lines == ["1.1 += 10", "1.1 finished: length"]
    cluster.assert_books_empty()


@pytest.mark.parametrize("end", ["fails", "lets go", "is lost"])
def test_a_given_up_transfer_is_continued_once_its_prefill_node_has_said_why(
    cluster: Any, say: Any, end: str
) -> None:
    cluster.submit()
    assert cluster.report("d1", say.failed(1, "TRANSFER_CANCELLED")) == []
    if end == "is lost":
        cluster.attach("p2")
        lines = cluster.lose("p1")
    else:
        report = say.failed(1, "NODE_UNAVAILABLE") if end == "fails" else say.released(1)
        lines = cluster.report("p1", report)
    assert [line.rsplit(" ", 4)[0] for line in lines][:1] == ["d1 <- reserve"]


def test_a_request_goes_on_when_neither_node_holds_its_kv_any_more(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.first_token()
    assert cluster.report("d1", say.failed(1, "TRANSFER_CANCELLED")) == []
    assert cluster.report("p1", say.released(1)) == SECOND


def test_decode_tokens_that_overtake_the_first_one_wait_for_it(cluster: Any, say: Any) -> None:
    cluster.submit()
    assert cluster.report("d1", say.verified(1)) == []
    assert cluster.tokens("d1", 1, 1, 11, 12) == []
    assert cluster.report("d1", say.finished(1), tokens=say.batch((1, 3, (13,)))) == []
    assert cluster.first_token() == [
        "1.1 += 10",
        "1.1 += 11 12 13",
        "p1 <- release 1",
        "1.1 finished: length",
    ]
    cluster.report("p1", say.released(1))
    cluster.assert_books_empty()


def test_a_finish_that_overtook_a_first_token_lost_with_its_node_is_computed_again(
    cluster: Any, say: Any
) -> None:
    cluster.attach("p2")
    prefill = cluster.submit()[1][:2]
    cluster.report("d1", say.finished(1), tokens=say.batch((1, 1, (11, 12, 13))))
    other = "p2" if prefill == "p1" else "p1"
    assert cluster.lose(prefill) == [
        "d1 <- reserve 2 [5, 6, 7]",
        f"{other} <- prefill 2 [5, 6, 7] to d1:1",
    ]


# ---- a node fails in each state --------------------------------------------------------------------


def to_prefilling(cluster: Any) -> None:
    cluster.submit()


def to_handing_off(cluster: Any) -> None:
    cluster.submit()
    cluster.first_token()


def to_decoding(cluster: Any) -> None:
    to_handing_off(cluster)
    cluster.verify()


@pytest.mark.parametrize(
    ("reach", "prompt"),
    [
        (to_prefilling, "[5, 6, 7]"),
        (to_handing_off, "[5, 6, 7, 10]"),
        (to_decoding, "[5, 6, 7, 10]"),
    ],
)
def test_a_lost_decode_node_is_replaced_and_only_the_rest_is_asked_for(
    cluster: Any, say: Any, reach: Callable[[Any], None], prompt: str
) -> None:
    reach(cluster)
    holds_prefill = reach is not to_decoding
    assert cluster.lose("d1") == (["p1 <- release 1"] if holds_prefill else [])
    assert cluster.state() == {"queued": 1}
    assert cluster.attach("d2") == [f"d2 <- reserve 2 {prompt}", f"p1 <- prefill 2 {prompt} to d2:1"]
    if holds_prefill:
        cluster.report("p1", say.released(1))
    index = prompt.count(",") - 2
    cluster.first_token(2, index, 10 + index)
    cluster.report("d2", say.verified(2))
    cluster.report("p1", say.released(2))
    rest = tuple(range(11 + index, 14))
    cluster.report("d2", say.finished(2), tokens=say.batch((2, index + 1, rest)))
    assert cluster.delivered[1, 1] == [10, 11, 12, 13]
    cluster.assert_books_empty()


@pytest.mark.parametrize(
    ("reach", "prompt"), [(to_prefilling, "[5, 6, 7]"), (to_handing_off, "[5, 6, 7, 10]")]
)
def test_a_prefill_node_lost_before_the_handoff_is_verified_is_replaced(
    cluster: Any, reach: Callable[[Any], None], prompt: str
) -> None:
    reach(cluster)
    assert cluster.lose("p1") == ["d1 <- release 1"]
    assert cluster.attach("p2") == [f"d1 <- reserve 2 {prompt}", f"p2 <- prefill 2 {prompt} to d1:1"]


def test_a_prefill_node_lost_while_decoding_changes_nothing(cluster: Any, say: Any) -> None:
    to_handing_off(cluster)
    cluster.report("d1", say.verified(1))
    assert cluster.lose("p1") == []
    assert cluster.tokens("d1", 1, 1, 11) == ["1.1 += 11"]
    cluster.report("d1", say.finished(1, FinishReason.STOP))
    cluster.assert_books_empty()


@pytest.mark.parametrize("node_id", ["p1", "d1"])
@pytest.mark.parametrize("reach", [to_prefilling, to_handing_off])
def test_a_failed_attempt_releases_the_other_node_and_goes_elsewhere(
    cluster: Any, say: Any, reach: Callable[[Any], None], node_id: str
) -> None:
    reach(cluster)
    cluster.attach("p2", "d2")
    other = "d1" if node_id == "p1" else "p1"
    replacement = node_id[0] + "2"
    lines = cluster.report(node_id, say.failed(1))
    assert lines[0] == f"{other} <- release 1"
    assert any(line.startswith(f"{replacement} <- ") for line in lines[1:])
    assert not any(line.startswith(f"{node_id} <- ") for line in lines[1:])


def test_a_failed_transfer_avoids_both_its_ends(cluster: Any, say: Any) -> None:
    to_handing_off(cluster)
    cluster.attach("p2", "d2")
    assert cluster.report("d1", say.failed(1, "TRANSFER_TIMEOUT")) == [
        "p1 <- release 1",
        "d2 <- reserve 2 [5, 6, 7, 10]",
        "p2 <- prefill 2 [5, 6, 7, 10] to d2:1",
    ]


def test_without_another_node_the_one_that_failed_is_tried_again(cluster: Any, say: Any) -> None:
    to_decoding(cluster)
    assert cluster.report("d1", say.failed(1)) == SECOND


def test_a_prefill_node_that_fails_after_the_handoff_is_verified_changes_nothing(
    cluster: Any, say: Any
) -> None:
    to_handing_off(cluster)
    cluster.report("d1", say.verified(1))
    assert cluster.report("p1", say.failed(1, "TRANSFER_FAILED")) == []
    assert cluster.state() == {"decoding": 1}


@pytest.mark.parametrize("code", ["INVALID_REQUEST", "CONTEXT_LENGTH_EXCEEDED"])
def test_what_is_the_callers_fault_is_not_tried_again(cluster: Any, say: Any, code: str) -> None:
    cluster.submit()
    assert cluster.report("p1", say.failed(1, code)) == ["d1 <- release 1", f"1.1 failed: {code}"]
    cluster.report("d1", say.released(1))
    cluster.assert_books_empty()


def test_later_continuations_pause_and_the_last_error_is_delivered(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.report("d1", say.failed(1))
    assert cluster.report("d1", say.failed(2)) == ["p1 <- release 2"]
    assert cluster.tick(0.1) == []
    assert cluster.tick(0.25) == ["d1 <- reserve 3 [5, 6, 7]", "p1 <- prefill 3 [5, 6, 7] to d1:1"]
    cluster.report("d1", say.failed(3))
    cluster.tick(1.5)
    assert cluster.report("d1", say.failed(4)) == ["p1 <- release 4", "1.1 failed: ENGINE_FAILED"]
    assert cluster.error().message == "it broke"


def test_a_request_that_pauses_lets_others_pass(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.report("d1", say.failed(1))
    cluster.report("d1", say.failed(2))
    assert cluster.submit("other", stream_id=2)[0] == "d1 <- reserve 3 [5, 6, 7]"


# ---- the end was delivered, its report was lost ----------------------------------------------------


@pytest.mark.parametrize(
    ("last", "sampling", "reason"),
    [
        (2, {}, "stop"),
        (9, {"stop_token_ids": (9,)}, "stop"),
        (2, {"ignore_eos": True, "max_tokens": 2}, "length"),
        (2, {"ignore_eos": True, "grammar": Grammar(GrammarKind.JSON_OBJECT)}, "stop"),
        (11, {"max_tokens": 2}, "length"),
    ],
)
def test_an_end_whose_report_was_lost_with_its_node_is_recognised(
    cluster: Any, last: int, sampling: dict[str, Any], reason: str
) -> None:
    cluster.submit(**({"max_tokens": 9} | sampling))
    cluster.first_token()
    cluster.verify()
    cluster.tokens("d1", 1, 1, last)
    assert cluster.lose("d1") == [f"1.1 finished: {reason}"]
    cluster.assert_books_empty()


def test_a_full_context_whose_report_was_lost_is_recognised(cluster: Any) -> None:
    cluster.submit(prompt=tuple([5] * 62), max_tokens=9)
    cluster.first_token()
    cluster.verify()
    cluster.tokens("d1", 1, 1, 11)
    assert cluster.lose("d1") == ["1.1 finished: length"]


def test_a_refusal_after_the_last_token_does_not_continue_a_finished_output(cluster: Any, say: Any) -> None:
    cluster.submit(max_tokens=1)
    cluster.tokens("p1", 1, 0, 10)
    assert cluster.report("d1", say.refused(1)) == ["p1 <- release 1", "1.1 finished: length"]
    cluster.report("p1", say.finished(1))
    cluster.assert_books_empty()


# ---- late and strange messages ---------------------------------------------------------------------


def test_tokens_of_a_dead_attempt_are_dropped_and_its_report_settles_it(cluster: Any, say: Any) -> None:
    to_prefilling(cluster)
    cluster.attach("p2")
    cluster.report("p1", say.failed(1))
    assert cluster.tokens("d1", 1, 0, 99) == []
    assert cluster.state() == {"prefilling": 1}
    cluster.report("d1", say.released(1))
    assert cluster.first_token(2, node_id="p2") == ["1.1 += 10"]


def test_a_terminal_report_that_crosses_a_release_settles_once(cluster: Any, say: Any) -> None:
    to_decoding(cluster)
    assert cluster.cancel() == ["d1 <- release 1", "1.1 failed: CANCELLED"]
    assert cluster.report("d1", say.finished(1)) == []
    cluster.assert_books_empty()
    assert cluster.report("d1", say.released(1)) == []


def test_an_unknown_attempt_that_holds_something_is_told_to_let_go(cluster: Any, say: Any) -> None:
    assert cluster.report("d1", say.verified(99)) == ["d1 <- release 99"]
    assert cluster.report("d1", say.finished(99)) == []
    assert cluster.tokens("d1", 99, 0, 1) == []


def test_a_node_cannot_speak_for_anothers_attempt(cluster: Any, say: Any) -> None:
    cluster.attach("d2")
    lines = cluster.submit()
    idle = "d2" if lines[0].startswith("d1") else "d1"
    assert cluster.tokens(idle, 1, 0, 99) == []
    assert cluster.report(idle, say.failed(1)) == []
    assert cluster.state() == {"prefilling": 1}


def test_a_prefill_node_cannot_verify_a_handoff(cluster: Any, say: Any) -> None:
    to_handing_off(cluster)
    assert cluster.report("p1", say.verified(1)) == []
    assert cluster.state() == {"handing_off": 1}


def test_a_prefill_node_cannot_end_a_request_that_decodes(cluster: Any, say: Any) -> None:
    to_handing_off(cluster)
    cluster.report("d1", say.verified(1))
    assert cluster.report("p1", say.finished(1)) == []
    assert cluster.tokens("d1", 1, 1, 11) == ["1.1 += 11"]


@pytest.mark.parametrize(
    "entry",
    [(1, 3, (13,)), (1, 1, (11, 12, 13, 14)), (1, 1, (-1,)), (1, 1, (2**40,))],
    ids=["a gap", "beyond max_tokens", "a negative token", "a huge token"],
)
def test_a_node_that_breaks_the_token_contract_loses_the_attempt(cluster: Any, say: Any, entry: Any) -> None:
    to_decoding(cluster)
    lines = cluster.report("d1", tokens=say.batch(entry))
    assert "d1 <- release 1" in lines
    assert cluster.delivered[1, 1] in ([10], [10, 11, 12, 13])


def test_a_prefill_reported_done_without_its_token_is_a_failure(cluster: Any, say: Any) -> None:
    cluster.submit()
    assert cluster.report("p1", say.prefilled(1))[:2] == ["p1 <- release 1", "d1 <- release 1"]


def test_a_decode_node_that_lets_go_unasked_has_failed(cluster: Any, say: Any) -> None:
    to_decoding(cluster)
    assert cluster.report("d1", say.released(1)) == SECOND
