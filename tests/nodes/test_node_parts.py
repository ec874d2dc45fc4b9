"""The small pure parts of a node: outbox, backoff, load pacing, token columns."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.errors import Overloaded
from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import KVReleased, NodeFrame, NodeLoad
from kvrelay.core.request import TokenLogprobs
from kvrelay.node.backoff import Backoff
from kvrelay.node.events import TokenColumns
from kvrelay.node.load_pacer import LoadPacer
from kvrelay.node.outbox import Outbox


def columns(*token_ids: int, logprobs: TokenLogprobs | None = None) -> TokenColumns:
    made = TokenColumns()
    for token_id in token_ids:
        made.append(1, token_id, token_id, logprobs)
    return made


def test_outbox_merges_frames_in_order() -> None:
    outbox = Outbox(100)
    outbox.add(columns(1, 2), ())
    outbox.add(None, (KVReleased(AttemptId(5)),))
    outbox.add(columns(3), (KVReleased(AttemptId(6)),))
    frame = outbox.take(NodeLoad(num_running=1))
    assert frame.tokens is not None
    assert list(frame.tokens.token_ids) == [1, 2, 3]
    assert list(frame.tokens.counts) == [1, 1, 1]
    assert frame.reports == (KVReleased(AttemptId(5)), KVReleased(AttemptId(6)))
    assert frame.load == NodeLoad(num_running=1)
    assert outbox.is_empty


def test_an_empty_outbox_gives_a_heartbeat() -> None:
    assert Outbox(1).take(None) == NodeFrame()


def test_outbox_refuses_what_a_slow_router_lets_pile_up() -> None:
    outbox = Outbox(2)
    outbox.add(columns(1, 2), ())
    with pytest.raises(Overloaded, match="3 tokens"):
        outbox.add(columns(3), ())
    outbox.take(None)
    outbox.add(columns(3), ())


def test_outbox_bounds_reports_too() -> None:
    outbox = Outbox(1)
    outbox.add(None, (KVReleased(AttemptId(5)),))
    with pytest.raises(Overloaded):
        outbox.add(None, (KVReleased(AttemptId(6)),))


@given(st.lists(st.lists(st.sampled_from([None, TokenLogprobs(-1.0), TokenLogprobs(-2.0)]), max_size=4)))
def test_logprobs_stay_with_their_tokens_when_columns_are_merged(
    frames: list[list[TokenLogprobs | None]],
) -> None:
    merged, expected = TokenColumns(), []
    for frame in frames:
        made = TokenColumns()
        for logprobs in frame:
            made.append(1, len(expected), len(expected), logprobs)
            expected.append(logprobs)
        merged.extend(made)
    assert merged.token_ids == list(range(len(expected)))
    if any(logprobs is not None for logprobs in expected):
        assert merged.logprobs == expected
    else:
        assert merged.logprobs == []


def test_backoff_doubles_up_to_its_bound_with_jitter() -> None:
    backoff = Backoff(0.1, 1.0, Random(1))
    delays = [backoff.next_delay_s() for _ in range(8)]
    for delay_s, full_s in zip(delays, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0], strict=True):
        assert full_s / 2 <= delay_s <= full_s
    assert len(set(delays[4:])) == 4, "no jitter"
    backoff.reset()
    assert backoff.next_delay_s() <= 0.1


def test_load_is_told_after_a_change_but_not_too_often() -> None:
    pacer, idle, busy = LoadPacer(0.1), NodeLoad(), NodeLoad(num_running=1)
    assert pacer.take(idle, 0.0) == idle
    assert pacer.take(busy, 0.05) is None
    assert pacer.due_in_s(0.05) == pytest.approx(0.05)
    assert pacer.take(busy, 0.11) == busy
    assert pacer.take(busy, 0.5) is None
    assert pacer.take(busy, 0.5, is_heartbeat=True) == busy
