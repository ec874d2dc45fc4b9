"""Prefixes that go from one real node to another: content, whoever holds it, and nothing left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import (
    AttemptFinished,
    AttemptRefused,
    KVReleased,
    PrefillFinished,
    PullOrder,
    ReleaseKV,
    ReserveDecode,
    Role,
    SendPrefix,
    StartPrefill,
    StopPull,
)
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import INSTANT
from kvrelay.node.service import NodeService

if TYPE_CHECKING:
    from tests.nodes.shell.conftest import AttachedNode, FakeRouter, Workshop

SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)


def request_of(seed: int, num_tokens: int) -> TokenRequest:
    token_ids = tuple((seed * 7919 + position * 31) % 30_000 + 1 for position in range(num_tokens))
    return TokenRequest(token_ids, num_tokens, SAMPLING)


def sim_engine(block_size: int) -> SimEngine:
    config = EngineConfig(
        "sim",
        EngineKind.SIM,
        block_size=block_size,
        num_blocks=4096 // block_size,
        max_num_seqs=32,
        max_model_len=2048,
        sim_timing=INSTANT,
    )
    return SimEngine(config)


def alone(request: TokenRequest) -> list[int]:
    """What one engine answers by itself."""
    engine, tokens = sim_engine(16), []
    engine.submit(request, SequenceKey("alone"))
    while engine.has_work():
        tokens += [output.token_id for output in engine.step().outputs]
    return tokens


@dataclass
class Trio:
    """One router, two prefill nodes and a decode node, all of different block sizes, by name."""

    router: FakeRouter
    services: dict[str, NodeService]
    nodes: dict[str, AttachedNode]
    next_id: int = 1
    pulls: dict[int, int] = field(default_factory=dict)

    def new_id(self) -> AttemptId:
        self.next_id += 1
        return AttemptId(self.next_id - 1)

    def start(self, request: TokenRequest, prefill: str, pull: PullOrder | None = None) -> AttemptId:
        attempt = self.new_id()
        self.nodes["d"].send(ReserveDecode(attempt, request))
        address = self.services["d"].transfer_address
        self.nodes[prefill].send(StartPrefill(attempt, request, address, pull))
        return attempt

    def start_pulling(self, request: TokenRequest, source: str, target: str, num_tokens: int) -> AttemptId:
        """Prefill at `target`, with that much of the prompt from `source`."""
        pull = self.new_id()
        prefix = Prefix(request.token_ids[:num_tokens], request.cache_salt)
        self.nodes[source].send(SendPrefix(pull, prefix, self.services[target].transfer_address))
        attempt = self.start(request, target, PullOrder(pull, num_tokens))
        self.pulls[attempt] = pull
        return attempt

    async def answer(self, attempt: AttemptId) -> list[int]:
        await self.router.until(lambda: bool(self.nodes["d"].terminals(attempt)))
        [end] = self.nodes["d"].terminals(attempt)
        assert isinstance(end, AttemptFinished), end
        tokens = {k: v for node in self.nodes.values() for k, v in node.tokens[attempt].items()}
        return [tokens[index] for index in range(len(tokens))]

    async def prefilled(self, prefill: str, attempt: AttemptId) -> PrefillFinished:
        node = self.nodes[prefill]
        await self.router.until(lambda: node.has(PrefillFinished, attempt))
        return next(
            item for item in node.reports if isinstance(item, PrefillFinished) and item.attempt == attempt
        )

    async def until_idle(self) -> None:
        await self.router.until_idle(*self.nodes.values())


@pytest_asyncio.fixture(params=["memory", "tcp", "ucx"])
async def trio(request: pytest.FixtureRequest, workshop: Workshop) -> AsyncIterator[Trio]:
    router = await workshop.router(lease_s=600.0)
    services, nodes = {}, {}
    for name, role, block_size in (("p", Role.PREFILL, 16), ("q", Role.PREFILL, 24), ("d", Role.DECODE, 8)):
        services[name] = await workshop.node(
            role,
            [router.address],
            transport=request.param,
            engine=sim_engine(block_size),
            pull_timeout_s=600.0,
        )
        nodes[name] = await router.node(services[name].node_id)
    yield Trio(router, services, nodes)


async def test_a_prefix_pulled_from_a_prefill_node_gives_the_computed_answer(trio: Trio) -> None:
    request = request_of(1, 700)
    await trio.answer(trio.start(request, "p"))
    attempt = trio.start_pulling(request, "p", "q", 640)
    assert await trio.answer(attempt) == alone(request)
    report = await trio.prefilled("q", attempt)
    assert report.num_pulled_tokens == 640 // 24 * 24
    assert report.num_cached_tokens == 640 // 24 * 24
    assert report.pull_s > 0
    assert report.pull_error == ""
    await trio.until_idle()
    assert trio.nodes["p"].terminals(trio.pulls[attempt]) == [KVReleased(AttemptId(trio.pulls[attempt]))]


async def test_what_a_decode_node_generated_goes_back_to_a_prefill_node(trio: Trio) -> None:
    request = request_of(2, 300)
    answer = await trio.answer(trio.start(request, "p"))
    turn = TokenRequest((*request.token_ids, *answer, 5, 6, 7), 309, SAMPLING)
    attempt = trio.start_pulling(turn, "d", "q", 304)
    assert await trio.answer(attempt) == alone(turn)
    report = await trio.prefilled("q", attempt)
    assert report.num_pulled_tokens == 304 // 24 * 24
    await trio.until_idle()


async def test_only_what_the_holder_has_is_pulled(trio: Trio) -> None:
    request = request_of(3, 400)
    await trio.answer(trio.start(TokenRequest(request.token_ids[:200], 200, SAMPLING), "p"))
    attempt = trio.start_pulling(request, "p", "q", 400)
    assert await trio.answer(attempt) == alone(request)
    report = await trio.prefilled("q", attempt)
    assert report.num_pulled_tokens == 192 // 24 * 24
    await trio.until_idle()


async def test_a_holder_without_any_of_it_costs_nothing_but_a_message(trio: Trio) -> None:
    request = request_of(4, 400)
    attempt = trio.start_pulling(request, "p", "q", 400)
    assert await trio.answer(attempt) == alone(request)
    report = await trio.prefilled("q", attempt)
    assert (report.num_pulled_tokens, report.num_cached_tokens) == (0, 0)
    assert report.pull_error == "TRANSFER_CANCELLED"
    await trio.until_idle()
    [end] = trio.nodes["p"].terminals(trio.pulls[attempt])
    assert isinstance(end, AttemptRefused)


async def test_a_prompt_that_comes_behind_a_pull_of_its_prefix_finds_it(trio: Trio) -> None:
    request = request_of(8, 400)
    other = TokenRequest((*request.token_ids[:384], *range(1, 50)), 433, SAMPLING)
    await trio.answer(trio.start(request, "p"))
    first, second = trio.start_pulling(request, "p", "q", 384), trio.start(other, "q")
    assert await trio.answer(first) == alone(request)
    assert await trio.answer(second) == alone(other)
    report = await trio.prefilled("q", second)
    assert (report.num_cached_tokens, report.num_pulled_tokens) == (384, 0)
    await trio.until_idle()


async def test_many_pulls_at_once_in_both_directions_leave_nothing(trio: Trio) -> None:
    requests = [request_of(seed, 100 + 20 * seed) for seed in range(12)]
    for request, prefill in zip(requests, "pq" * 6, strict=True):
        await trio.answer(trio.start(request, prefill))
    attempts = [
        trio.start_pulling(request, source, target, len(request.token_ids))
        for request, source, target in zip(requests, "pq" * 6, "qp" * 6, strict=True)
    ]
    for request, attempt, target in zip(requests, attempts, "qp" * 6, strict=True):
        assert await trio.answer(attempt) == alone(request)
        assert (await trio.prefilled(target, attempt)).num_pulled_tokens > 0
    await trio.until_idle()


async def test_a_prefix_that_nobody_sends_is_computed_when_the_router_says_so(trio: Trio) -> None:
    request = request_of(5, 200)
    attempt = trio.start(request, "q", PullOrder(trio.new_id(), 100))
    trio.nodes["q"].send(StopPull(attempt))
    assert await trio.answer(attempt) == alone(request)
    assert (await trio.prefilled("q", attempt)).pull_error == "TRANSFER_FAILED"
    await trio.until_idle()


async def test_a_release_during_a_pull_frees_all_three_nodes(trio: Trio) -> None:
    request = request_of(6, 200)
    attempt = trio.start(request, "q", PullOrder(trio.new_id(), 100))
    for name in ("q", "d"):
        trio.nodes[name].send(ReleaseKV(attempt))
    await trio.router.until(lambda: bool(trio.nodes["q"].terminals(attempt)))
    assert trio.nodes["q"].terminals(attempt) == [KVReleased(attempt)]
    await trio.until_idle()


async def test_a_send_that_nobody_takes_is_released_on_request(trio: Trio) -> None:
    request = request_of(7, 200)
    await trio.answer(trio.start(request, "p"))
    pull = trio.new_id()
    trio.nodes["p"].send(SendPrefix(pull, Prefix(request.token_ids), trio.services["q"].transfer_address))
    trio.nodes["p"].send(ReleaseKV(pull))
    await trio.router.until(lambda: bool(trio.nodes["p"].terminals(pull)))
    assert trio.nodes["p"].terminals(pull) == [KVReleased(pull)]
    await trio.until_idle()
