"""Prompts that begin with what is being pulled for another wait for it; nothing is pulled twice at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.core.node_messages import KVReleased, PrefillFinished, StartPrefill
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.engine.interface import SequenceKey
from kvrelay.node.attempt import AttemptState, sequence_key
from kvrelay.node.events import (
    CancelTransfer,
    KeepPrefix,
    NodeEffect,
    PrefillStarted,
    PrefixKept,
    RefuseTransfer,
    ReleaseSequence,
    ReservePrefix,
    SequenceReleased,
    SubmitPrefill,
    TransferCancelled,
)

if TYPE_CHECKING:
    from tests.nodes.conftest import CoreUnderTest

PULL = TransferId(7, AttemptId(9))
PULL_KEY = sequence_key(PULL)


def key_of_attempt(attempt: int) -> SequenceKey:
    return sequence_key(TransferId(7, AttemptId(attempt)))


def submitted(effects: list[NodeEffect]) -> list[SequenceKey]:
    return [effect.key for effect in effects if isinstance(effect, SubmitPrefill)]


def test_a_prompt_whose_prefix_is_on_its_way_waits_for_it(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    assert p.prefill(2) == []
    assert p.state(2) is AttemptState.PULLING
    p.now_s += 0.5
    effects = p.receive_done(9, num_tokens=4)
    assert effects[0] == KeepPrefix(PULL_KEY, 4)
    assert submitted(effects) == [key, key_of_attempt(2)]
    p.tell(PrefixKept(PULL_KEY, 4))
    p.tell(PrefillStarted(key_of_attempt(2), p.now_s, 4))
    p.token(2)
    [report] = p.take_reports()
    assert report == PrefillFinished(AttemptId(2), 4, 0.0, 0.0, pull_s=0.5)


def test_the_same_prefix_is_not_pulled_twice_at_once(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    assert p.prefill_with_pull(2, pull=8) == [RefuseTransfer(TransferId(7, AttemptId(8)))]
    p.prefix_held()
    assert submitted(p.receive_done(9)) == [key, key_of_attempt(2)]


def test_a_longer_prefix_is_pulled_beside_a_shorter_one(p: CoreUnderTest) -> None:
    p.prefill_with_pull(num_tokens=2)
    assert p.prefill_with_pull(2, pull=8, num_tokens=4) == [
        ReservePrefix(key_of_attempt(8), Prefix((1, 2, 3, 4)))
    ]


def test_another_prompt_does_not_wait(p: CoreUnderTest, request_of: Callable[..., TokenRequest]) -> None:
    p.prefill_with_pull()
    shorter = request_of(3)
    salted = replace(request_of(5), cache_salt=b"mine")
    other = replace(request_of(5), token_ids=(9, 2, 3, 4, 5))
    for number, request in enumerate((shorter, salted, other), 2):
        effects = p.command(StartPrefill(AttemptId(number), request, "d:1"))
        assert submitted(effects) == [key_of_attempt(number)]


@pytest.mark.parametrize("how", ["fails", "stopped", "its attempt ends"])
def test_whoever_waits_for_a_pull_that_comes_to_nothing_computes(
    p: CoreUnderTest, key: SequenceKey, how: str
) -> None:
    p.prefill_with_pull()
    p.prefill(2)
    if how == "its attempt ends":
        assert submitted(p.release()) == [key_of_attempt(2)]
        return
    p.prefix_held()
    if how == "fails":
        effects = p.receive_failed(9)
    else:
        assert p.stop_pull() == [CancelTransfer(PULL)]
        effects = p.tell(TransferCancelled(PULL))
    assert sorted(submitted(effects)) == sorted([key, key_of_attempt(2)])


def test_an_attempt_that_ends_while_it_waits_holds_nothing(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    p.prefill(2)
    assert p.release(2) == [ReleaseSequence(key_of_attempt(2))]
    p.tell(SequenceReleased(key_of_attempt(2)))
    assert p.take_reports() == [KVReleased(AttemptId(2))]
    assert submitted(p.receive_done(9)) == [key]
