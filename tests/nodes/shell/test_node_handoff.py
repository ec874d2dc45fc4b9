"""Whole handoffs between two real nodes: content, ends, cancels in each state, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    HandoffVerified,
    KVReleased,
    PrefillFinished,
    ReleaseKV,
    Reserved,
    ReserveDecode,
    StartPrefill,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import INSTANT, SimTiming

if TYPE_CHECKING:
    from tests.nodes.shell.conftest import Pair

    MakePair = Callable[..., Awaitable[Pair]]

SLOW_PREFILL = SimTiming(3600.0 - 1, 0, 0, 0, 0, 0)
SLOW_DECODE = SimTiming(0, 0, 0, 0.02, 0, 0)


def request_of(seed: int, num_tokens: int, max_tokens: int) -> TokenRequest:
    token_ids = tuple((seed * 7919 + position * 31) % 30_000 + 1 for position in range(num_tokens))
    return TokenRequest(token_ids, num_tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def alone(request: TokenRequest) -> list[int]:
    """What one engine answers by itself."""
    engine = SimEngine(
        EngineConfig("sim", EngineKind.SIM, num_blocks=256, max_model_len=2048, sim_timing=INSTANT)
    )
    engine.submit(request, SequenceKey("alone"))
    tokens: list[int] = []
    while engine.has_work():
        tokens += [output.token_id for output in engine.step().outputs]
    return tokens


@pytest.mark.parametrize("transport", ["memory", "tcp", "ucx"])
async def test_output_of_a_handoff_is_what_one_engine_answers(make_pair: MakePair, transport: str) -> None:
    pair = await make_pair(transport=transport)
    requests = [request_of(seed, num_tokens, 6) for seed, num_tokens in enumerate([1, 15, 16, 17, 700])]
    attempts = [pair.start(request) for request in requests]
    await pair.until_ended(*attempts)
    for attempt, request in zip(attempts, requests, strict=True):
        assert pair.output(attempt) == alone(request)
        assert pair.p.terminals(attempt) == [KVReleased(AttemptId(attempt))]
        assert pair.d.terminals(attempt) == [AttemptFinished(AttemptId(attempt), FinishReason.LENGTH)]
        assert pair.p.has(PrefillFinished, attempt)
        assert pair.d.has(Reserved, attempt)
        assert pair.d.has(HandoffVerified, attempt)
    await pair.until_idle()


async def test_many_handoffs_at_once_leave_nothing(make_pair: MakePair) -> None:
    pair = await make_pair()
    requests = [request_of(seed % 10, 20 + seed, 5) for seed in range(24)]
    attempts = [pair.start(request) for request in requests]
    await pair.until_ended(*attempts)
    for attempt, request in zip(attempts, requests, strict=True):
        assert pair.output(attempt) == alone(request)
    await pair.until_idle()


async def test_a_second_prompt_moves_only_what_the_decode_node_lacks(make_pair: MakePair) -> None:
    pair = await make_pair()
    first = pair.start(request_of(1, 64, 3))
    await pair.until_ended(first)
    second = pair.start(request_of(1, 80, 3))
    await pair.until_ended(second)
    moved = {
        report.attempt: report.num_bytes for report in pair.d.reports if isinstance(report, HandoffVerified)
    }
    assert moved[AttemptId(second)] == moved[AttemptId(first)] // 64 * 16
    [prefilled] = [
        report
        for report in pair.p.reports
        if isinstance(report, PrefillFinished) and report.attempt == second
    ]
    assert prefilled.num_cached_tokens == 64


async def test_a_first_token_that_finishes_ends_the_prefill_node_by_itself(make_pair: MakePair) -> None:
    pair = await make_pair()
    request = request_of(3, 40, 1)
    attempt = pair.start(request)
    await pair.router.until(lambda: bool(pair.p.terminals(attempt)))
    assert pair.p.terminals(attempt) == [AttemptFinished(AttemptId(attempt), FinishReason.LENGTH)]
    pair.d.send(ReleaseKV(AttemptId(attempt)))
    await pair.until_ended(attempt)
    assert pair.output(attempt) == alone(request)
    await pair.until_idle()


async def test_cancel_while_decoding_frees_both(make_pair: MakePair) -> None:
    pair = await make_pair(timing=SLOW_DECODE)
    attempt = pair.start(request_of(1, 40, 1500))
    await pair.router.until(lambda: len(pair.d.tokens[attempt]) >= 3)
    pair.release(attempt)
    await pair.until_ended(attempt)
    assert pair.d.terminals(attempt) == [KVReleased(AttemptId(attempt))]
    await pair.until_idle()


async def test_cancel_while_the_decode_node_waits_for_kv_frees_it(make_pair: MakePair) -> None:
    pair = await make_pair()
    attempt = AttemptId(1)
    pair.d.send(ReserveDecode(attempt, request_of(1, 40, 5)))
    await pair.router.until(lambda: pair.d.has(Reserved, attempt))
    pair.d.send(ReleaseKV(attempt))
    await pair.router.until(lambda: bool(pair.d.terminals(attempt)))
    assert pair.d.terminals(attempt) == [KVReleased(attempt)]
    await pair.router.until_idle(pair.d)


async def test_cancel_while_the_prefill_node_has_nobody_to_push_to_frees_it(make_pair: MakePair) -> None:
    pair = await make_pair()
    attempt = AttemptId(1)
    pair.p.send(StartPrefill(attempt, request_of(1, 40, 5), pair.d_service.transfer_address))
    await pair.router.until(lambda: pair.p.has(PrefillFinished, attempt))
    pair.p.send(ReleaseKV(attempt))
    await pair.router.until(lambda: bool(pair.p.terminals(attempt)))
    assert pair.p.terminals(attempt) == [KVReleased(attempt)]
    await pair.router.until_idle(pair.p)


async def test_cancel_of_one_side_fails_the_other_and_both_are_freed(make_pair: MakePair) -> None:
    pair = await make_pair()
    attempt = AttemptId(1)
    pair.p.send(StartPrefill(attempt, request_of(1, 40, 5), pair.d_service.transfer_address))
    await pair.router.until(lambda: pair.p.has(PrefillFinished, attempt))
    pair.p.send(ReleaseKV(attempt))
    await pair.router.until(lambda: bool(pair.p.terminals(attempt)))
    pair.d.send(ReserveDecode(attempt, request_of(1, 40, 5)))
    pair.d.send(ReleaseKV(attempt))
    await pair.until_ended(attempt)
    await pair.until_idle()


@pytest.mark.parametrize("num_turns", range(12))
async def test_cancel_at_any_moment_frees_both(make_pair: MakePair, num_turns: int) -> None:
    """The cancel comes some turns of the event loop after the start: early ones meet the first states."""
    pair = await make_pair()
    attempts = [pair.start(request_of(seed, 300, 1500)) for seed in range(4)]
    for _ in range(num_turns * 10):
        await asyncio.sleep(0)
    for attempt in attempts:
        pair.release(attempt)
    await pair.until_ended(*attempts)
    await pair.until_idle()


async def test_a_handoff_to_nobody_fails_with_its_reason(make_pair: MakePair) -> None:
    pair = await make_pair()
    attempt = AttemptId(1)
    pair.p.send(StartPrefill(attempt, request_of(1, 40, 5), "127.0.0.1:1"))
    await pair.router.until(lambda: bool(pair.p.terminals(attempt)))
    [report] = pair.p.terminals(attempt)
    assert isinstance(report, AttemptFailed)
    assert report.code == "TRANSFER_FAILED"
    await pair.router.until_idle(pair.p)


async def test_prompts_that_differ_are_not_handed_over(make_pair: MakePair) -> None:
    pair = await make_pair()
    attempt = AttemptId(1)
    pair.d.send(ReserveDecode(attempt, request_of(1, 40, 5)))
    pair.p.send(StartPrefill(attempt, request_of(2, 40, 5), pair.d_service.transfer_address))
    await pair.until_ended(attempt)
    for node in (pair.p, pair.d):
        [report] = node.terminals(attempt)
        assert isinstance(report, AttemptFailed)
        assert report.code.startswith("TRANSFER")
    assert not pair.d.tokens[attempt]
    await pair.until_idle()


async def test_what_a_node_has_no_room_for_is_refused(make_pair: MakePair) -> None:
    pair = await make_pair(max_attempts_in_flight=2)
    for number in (1, 2, 3):
        pair.d.send(ReserveDecode(AttemptId(number), request_of(number, 40, 5)))
    await pair.router.until(lambda: bool(pair.d.terminals(3)))
    [refused] = pair.d.terminals(3)
    assert isinstance(refused, AttemptRefused)
    assert refused.code == "OVERLOADED"
    for number in (1, 2):
        pair.d.send(ReleaseKV(AttemptId(number)))
    await pair.router.until_idle(pair.d)
    pair.d.send(ReserveDecode(AttemptId(4), request_of(4, 9000, 5)))
    await pair.router.until(lambda: bool(pair.d.terminals(4)))
    [refused] = pair.d.terminals(4)
    assert isinstance(refused, AttemptRefused)
    assert refused.code == "CONTEXT_LENGTH_EXCEEDED"
