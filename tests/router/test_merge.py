"""Merging: whatever two nodes and dead attempts say, each output index comes once, in order."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import Role, TokenBatch
from kvrelay.core.request import TokenLogprobs
from kvrelay.router.events import DeliverTokens, SessionId
from kvrelay.router.merge import MergedBatch, batch_fault, merge_batch
from kvrelay.router.output_merge import OutputMerge

ATTEMPT = AttemptId(3)


@dataclass
class Attempt:
    attempt_id: AttemptId
    merge: OutputMerge


def attempt(number: int = 3, session: int = 1, max_tokens: int = 100, max_early_tokens: int = 100) -> Attempt:
    merge = OutputMerge(SessionId(session), number, 0, max_tokens, max_early_tokens)
    merge.start_attempt(AttemptId(number))
    return Attempt(AttemptId(number), merge)


def say(role: Role, *attempts: Attempt, batch: TokenBatch) -> MergedBatch:
    assert batch_fault(batch) == ""
    return merge_batch(batch, {found.attempt_id: found for found in attempts}, role, 0.0)


def spans(merged: MergedBatch) -> dict[int, list[int]]:
    """Delivered tokens by stream, and the columns checked."""
    streams: dict[int, list[int]] = {}
    for out in merged.deliveries.values():
        start = 0
        for stream_id, count in zip(out.stream_ids, out.counts, strict=True):
            streams.setdefault(stream_id, []).extend(out.token_ids[start : start + count])
            start += count
        assert start == len(out.token_ids)
        assert len(out.logprobs) in (0, len(out.token_ids))
    return streams


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(1, 29), max_size=8),
    repeats=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 6)), max_size=6),
    first_at=st.integers(0, 14),
    with_logprobs=st.booleans(),
)
def test_any_cutting_repetition_and_overtaking_gives_each_index_once_in_order(
    cuts: list[int], repeats: list[tuple[int, int]], first_at: int, with_logprobs: bool
) -> None:
    answer = list(range(100, 130))
    bounds = sorted({1, 30, *(cut for cut in cuts if cut > 1)})
    said = [(Role.DECODE, low, high) for low, high in pairwise(bounds)]
    said.insert(min(first_at, len(said)), (Role.PREFILL, 0, 1))
    for low, length in repeats:
        # A repetition of something said before, somewhere after it.
        said.append((Role.DECODE, low, min(low + length, 30)))
    found, delivered = attempt(), []
    for role, low, high in said:
        logprobs = [TokenLogprobs(-float(token)) for token in answer[low:high]] if with_logprobs else []
        batch = TokenBatch([3], [low], [high - low], answer[low:high], logprobs)
        merged = say(role, found, batch=batch)
        assert merged.faults == []
        delivered += spans(merged).get(3, [])
        for out in merged.deliveries.values():
            if with_logprobs:
                assert [entry.chosen for entry in out.logprobs if entry] == [-float(t) for t in out.token_ids]
    assert delivered == answer
    assert found.merge.next_index == 30
    assert list(found.merge.tokens) == answer


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=30))
def test_whatever_indices_a_node_claims_what_is_delivered_is_gapless(said: list[tuple[int, int]]) -> None:
    found, delivered = attempt(max_tokens=20, max_early_tokens=6), []
    for index, count in said:
        batch = TokenBatch([3], [index], [count], list(range(index, index + count)))
        delivered += spans(say(Role.DECODE, found, batch=batch)).get(3, [])
        assert len(found.merge.early_tokens) <= 6
    assert delivered == list(range(len(delivered)))
    assert len(delivered) <= 20


def test_a_step_of_many_streams_becomes_one_delivery_a_session() -> None:
    attempts = [attempt(number, session=number % 2) for number in range(1, 7)]
    ids = [found.attempt_id for found in attempts]
    say(Role.PREFILL, *attempts, batch=TokenBatch(ids, [0] * 6, [1] * 6, [9] * 6))
    merged = say(Role.DECODE, *attempts, batch=TokenBatch(ids, [1] * 6, [1] * 6, ids))
    assert merged.deliveries == {
        1: DeliverTokens(SessionId(1), [1, 3, 5], [1, 1, 1], [1, 3, 5]),
        0: DeliverTokens(SessionId(0), [2, 4, 6], [1, 1, 1], [2, 4, 6]),
    }
    assert (merged.num_delivered_tokens, merged.num_dropped_tokens) == (6, 0)


def test_streams_that_need_a_closer_look_do_not_disturb_the_others() -> None:
    flowing, early, dead = attempt(1), attempt(2), attempt(4)
    say(Role.PREFILL, flowing, batch=TokenBatch([1], [0], [1], [50]))
    dead.merge.start_attempt(AttemptId(9))
    batch = TokenBatch([2, 1, 4, 77], [1, 1, 0, 0], [1, 1, 1, 1], [20, 51, 40, 70])
    merged = say(Role.DECODE, flowing, early, dead, batch=batch)
    assert spans(merged) == {1: [51]}
    assert merged.num_dropped_tokens == 3
    assert early.merge.early_tokens == [20]


def test_the_tokens_of_an_ended_attempt_are_forgotten_with_it() -> None:
    found = attempt()
    say(Role.DECODE, found, batch=TokenBatch([3], [1], [2], [11, 12]))
    found.merge.start_attempt(AttemptId(5))
    successor = Attempt(AttemptId(5), found.merge)
    merged = say(Role.PREFILL, successor, batch=TokenBatch([5], [0], [1], [10]))
    assert spans(merged) == {3: [10]}


@pytest.mark.parametrize(
    ("index", "tokens", "fault"),
    [
        (2, [1], "skipped from output token 1 to 2"),
        (1, [1, 2, 3], "went on after max_tokens (3)"),
    ],
)
def test_a_flowing_stream_must_go_on_where_it_was(index: int, tokens: list[int], fault: str) -> None:
    found = attempt(max_tokens=3)
    say(Role.PREFILL, found, batch=TokenBatch([3], [0], [1], [9]))
    merged = say(Role.DECODE, found, batch=TokenBatch([3], [index], [len(tokens)], tokens))
    assert fault in merged.faults[0][1]


def test_one_token_too_many_is_found_on_the_hot_path_too() -> None:
    found = attempt(max_tokens=2)
    say(Role.PREFILL, found, batch=TokenBatch([3], [0], [1], [9]))
    assert say(Role.DECODE, found, batch=TokenBatch([3], [1], [1], [9])).faults == []
    assert len(say(Role.DECODE, found, batch=TokenBatch([3], [2], [1], [9])).faults) == 1
    assert found.merge.next_index == 2


def test_a_decode_node_that_repeats_from_the_first_token_on_is_merged_too() -> None:
    found = attempt()
    say(Role.DECODE, found, batch=TokenBatch([3], [1], [2], [11, 12]))
    merged = say(Role.DECODE, found, batch=TokenBatch([3], [0], [2], [10, 11]))
    assert spans(merged) == {3: [10, 11, 12]}


def test_an_empty_step_that_is_said_to_come_again_is_as_empty() -> None:
    """It went by as a step of rows that all flowed, and a run of no rows has no next one."""
    empty = TokenBatch()
    again = say(Role.DECODE, attempt(), batch=empty.next_step(()))
    assert (again.deliveries, again.faults, again.steady_run) == ({}, [], None)


def test_early_tokens_are_bounded() -> None:
    found = attempt(max_early_tokens=2)
    assert say(Role.DECODE, found, batch=TokenBatch([3], [1], [2], [1, 2])).faults == []
    merged = say(Role.DECODE, found, batch=TokenBatch([3], [3], [1], [3]))
    assert "more than 2 tokens ahead" in merged.faults[0][1]


@pytest.mark.parametrize(
    "batch",
    [
        TokenBatch([1], [0], [1], [1, 2]),
        TokenBatch([1], [0], [0], []),
        TokenBatch([1, 2], [0], [1, 1], [1, 2]),
        TokenBatch([1], [0], [1], [-1]),
        TokenBatch([1], [-1], [1], [1]),
        TokenBatch([1], [0], [1], [2**31]),
        TokenBatch([1], [0], [1], [1], [None, None]),
        TokenBatch([], [], [], [1]),
    ],
)
def test_an_unusable_batch_is_recognised(batch: TokenBatch) -> None:
    assert batch_fault(batch) != ""
