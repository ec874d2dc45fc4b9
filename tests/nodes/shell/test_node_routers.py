"""A node and its routers: attach, lose, come back, lease, drain, and routers that misbehave."""

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
    DrainStarted,
    HandoffVerified,
    ReleaseKV,
    Reserved,
    ReserveDecode,
    Role,
    StartPrefill,
)
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.interface import StepOutput
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import SimTiming
from kvrelay.v1 import cluster_pb2

if TYPE_CHECKING:
    from tests.nodes.shell.conftest import Pair, Workshop

    MakePair = Callable[..., Awaitable[Pair]]

SLOW_DECODE = SimTiming(0, 0, 0, 0.01, 0, 0)


def request_of(max_tokens: int, num_tokens: int = 40) -> TokenRequest:
    return TokenRequest(
        tuple(range(1, num_tokens + 1)), num_tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    )


async def test_a_node_describes_itself_and_heartbeats_with_its_load(workshop: Workshop) -> None:
    router = await workshop.router()
    service = await workshop.node(Role.DECODE, [router.address], tokenizer=b"bundle")
    node = await router.node(service.node_id)
    assert node.description.role is Role.DECODE
    assert node.description.transfer_address == service.transfer_address
    assert node.description.transport == "tcp"
    assert node.description.num_blocks == 256
    await router.until(lambda: node.num_frames >= 4)
    assert node.load is not None
    assert node.load.num_empty_blocks == 256
    assert node.tokenizer is None, "the tokenizer came unasked"
    assert service.attached.is_set()


async def test_the_tokenizer_is_sent_whole_when_it_is_wanted(workshop: Workshop) -> None:
    bundle = bytes(range(256)) * 10_000
    router = await workshop.router(wants_tokenizer=True)
    service = await workshop.node(Role.PREFILL, [router.address], tokenizer=bundle)
    node = await router.node(service.node_id)
    await router.until(lambda: node.tokenizer is not None)
    assert node.tokenizer == bundle


async def test_a_lost_router_is_dialled_until_it_is_back(workshop: Workshop) -> None:
    router = await workshop.router()
    service = await workshop.node(Role.PREFILL, [router.address])
    first = await router.node(service.node_id)
    await router.stop()
    await router.until(lambda: first.is_gone)
    await router.start()
    again = await router.node(service.node_id)
    assert again is not first
    assert again.description.incarnation == first.description.incarnation


async def test_a_node_may_start_before_its_router(workshop: Workshop) -> None:
    router = await workshop.router()
    await router.stop()
    service = await workshop.node(Role.PREFILL, [router.address])
    assert not service.attached.is_set()
    await router.start()
    await router.node(service.node_id)
    async with asyncio.timeout(10):
        await service.attached.wait()


async def test_two_routers_share_a_node_without_hearing_of_each_other(workshop: Workshop) -> None:
    one, two = await workshop.router(), await workshop.router()
    service = await workshop.node(Role.DECODE, [one.address, two.address])
    for router in (one, two):
        node = await router.node(service.node_id)
        node.send(ReserveDecode(AttemptId(1), request_of(5)))
    for router in (one, two):
        node = router.nodes[service.node_id]
        await router.until(lambda node=node: node.has(Reserved, 1))
        assert len(node.reports) == 1
    await one.until(lambda: (load := one.nodes[service.node_id].load) is not None and load.num_attempts == 2)


async def test_a_router_that_is_gone_for_longer_than_its_lease_loses_its_kv(
    make_pair: MakePair, workshop: Workshop
) -> None:
    pair = await make_pair(timing=SLOW_DECODE, lease_s=0.5)
    attempt = pair.start(request_of(1900))
    await pair.router.until(lambda: len(pair.d.tokens[attempt]) >= 2)
    waiting = AttemptId(77)
    pair.d.send(ReserveDecode(waiting, request_of(5)))
    await pair.router.until(lambda: pair.d.has(Reserved, waiting))
    engines = list(workshop.engines.values())
    assert all(engine.load().num_held_blocks for engine in engines[1:])
    await pair.router.stop()
    async with asyncio.timeout(10):
        await pair.d_service.idle.wait()
        await pair.p_service.idle.wait()
    assert not any(engine.load().num_held_blocks for engine in engines)


async def test_a_router_that_falls_silent_is_dropped_and_dialled_again(make_pair: MakePair) -> None:
    pair = await make_pair(timing=SLOW_DECODE, lease_s=0.5)
    attempt = pair.start(request_of(1900))
    await pair.router.until(lambda: len(pair.d.tokens[attempt]) >= 2)
    pair.router.is_silent = True
    await pair.router.until(lambda: pair.d.is_gone and pair.p.is_gone)
    pair.router.is_silent = False
    again = await pair.router.node(pair.d.description.node_id)
    await pair.router.until_idle(again)
    assert not again.reports, "attempts of the lost stream were reported"


async def test_a_router_that_comes_back_finds_its_old_attempts_released(make_pair: MakePair) -> None:
    pair = await make_pair(timing=SLOW_DECODE, lease_s=600.0)
    attempt = pair.start(request_of(1900))
    await pair.router.until(lambda: len(pair.d.tokens[attempt]) >= 2)
    for node in (pair.p, pair.d):
        node.outgoing.put_nowait(None)  # the stream ends, the router lives on
    await pair.router.until(lambda: pair.d.is_gone and pair.p.is_gone)
    again = await pair.router.node(pair.d.description.node_id)
    await pair.router.until_idle(again)
    assert not again.reports
    assert not again.tokens


@pytest.mark.parametrize(
    "frame",
    [
        cluster_pb2.RouterFrame(welcome=cluster_pb2.Welcome(router_epoch=5)),
        cluster_pb2.RouterFrame(commands=[cluster_pb2.Command(attempt=1)]),
        cluster_pb2.RouterFrame(
            commands=[cluster_pb2.Command(attempt=1, reserve_decode=cluster_pb2.ReserveDecode())]
        ),
    ],
    ids=["second welcome", "unknown command", "empty request"],
)
async def test_a_malformed_frame_ends_the_stream_and_harms_nothing(
    workshop: Workshop, frame: cluster_pb2.RouterFrame
) -> None:
    router = await workshop.router()
    service = await workshop.node(Role.DECODE, [router.address])
    node = await router.node(service.node_id)
    node.outgoing.put_nowait(frame)
    await router.until(lambda: node.is_gone)
    again = await router.node(service.node_id)
    again.send(ReserveDecode(AttemptId(9), request_of(5)))
    await router.until(lambda: again.has(Reserved, 9))


async def test_drain_finishes_what_runs_and_refuses_the_rest(make_pair: MakePair) -> None:
    pair = await make_pair(timing=SimTiming(0, 0, 0, 0.003, 0, 0))
    attempt = pair.start(request_of(60))
    await pair.router.until(lambda: pair.d.has(HandoffVerified, attempt))
    draining = asyncio.create_task(pair.d_service.drain())
    await pair.router.until(lambda: pair.d.has(DrainStarted))
    late = AttemptId(99)
    pair.d.send(ReserveDecode(late, request_of(5)))
    await pair.until_ended(attempt)
    await draining
    assert isinstance(pair.d.terminals(attempt)[0], AttemptFinished)
    assert len(pair.output(attempt)) == 60
    await pair.router.until(lambda: bool(pair.d.terminals(late)))
    [refused] = pair.d.terminals(late)
    assert isinstance(refused, AttemptRefused)
    await pair.d_service.close()
    await pair.router.until(lambda: pair.d.is_gone)


async def test_drain_that_takes_too_long_hands_back_before_it_leaves(make_pair: MakePair) -> None:
    pair = await make_pair(timing=SLOW_DECODE, drain_timeout_s=0.0)
    attempt = pair.start(request_of(1900))
    await pair.router.until(lambda: len(pair.d.tokens[attempt]) >= 2)
    await pair.d_service.drain()
    await pair.d_service.close()
    [report] = pair.d.terminals(attempt)
    assert isinstance(report, AttemptFailed)
    assert report.code == "NODE_UNAVAILABLE"
    assert pair.d.has(DrainStarted)


class BrokenEngine(SimEngine):
    """Raises in its first step."""

    def step(self) -> StepOutput:
        raise RuntimeError("broken kernel")


async def test_an_engine_that_raises_fails_its_attempts_and_the_node(workshop: Workshop) -> None:
    router = await workshop.router()
    engine = BrokenEngine(EngineConfig("sim", EngineKind.SIM, num_blocks=256, max_model_len=2048))
    service = await workshop.node(Role.PREFILL, [router.address], engine=engine)
    receiver = await workshop.node(Role.DECODE, [router.address])
    node = await router.node(service.node_id)
    node.send(StartPrefill(AttemptId(1), request_of(5), receiver.transfer_address))
    async with asyncio.timeout(10):
        assert "broken kernel" in await asyncio.shield(service.failed)
    await service.close()
    [report] = node.terminals(1)
    assert isinstance(report, AttemptFailed)
    assert report.code == "ENGINE_FAILED"
    del workshop.services[service.node_id]  # it failed, as it was meant to


async def test_more_reports_than_may_wait_drop_the_router_and_not_the_node(workshop: Workshop) -> None:
    router = await workshop.router()
    service = await workshop.node(Role.DECODE, [router.address], max_pending_tokens=1024)
    node = await router.node(service.node_id)
    node.send(*[ReleaseKV(AttemptId(number)) for number in range(1, 1026)])
    await router.until(lambda: node.is_gone)
    again = await router.node(service.node_id)
    again.send(ReleaseKV(AttemptId(1)))
    await router.until(lambda: len(again.reports) == 1)
    assert not node.reports
