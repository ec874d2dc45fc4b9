"""What nodes say of their blocks on the wire: all routers hear it, a snapshot comes when it is asked for; and
what a router makes of it is what the engine holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrelay.core.block_hash import block_key
from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import ReserveDecode, Role, SendKVSnapshot, StartPrefill
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.sim.engine import TOKEN_BYTES, SimEngine
from kvrelay.engine.sim.timing import INSTANT
from kvrelay.router.block_keys import PromptBlocks
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.kv_intake import KVIntake

if TYPE_CHECKING:
    from tests.nodes.shell.conftest import AttachedNode, FakeRouter, Workshop

BLOCK_SIZE = 16


def request_of(seed: int, num_tokens: int, max_tokens: int) -> TokenRequest:
    token_ids = tuple((seed * 7919 + position * 31) % 30_000 + 1 for position in range(num_tokens))
    return TokenRequest(token_ids, num_tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def small_engine() -> SimEngine:
    """It must evict, to a host tier and out of that."""
    return SimEngine(
        EngineConfig(
            "sim",
            EngineKind.SIM,
            num_blocks=20,
            block_size=BLOCK_SIZE,
            host_kv_bytes=10 * BLOCK_SIZE * TOKEN_BYTES,
            sim_timing=INSTANT,
        )
    )


def held_by(engine: SimEngine) -> tuple[set[int], set[int]]:
    """Keys on the device, and in the host tier."""
    pool = engine._scheduler.pool
    host = () if pool.host_tier is None else pool.host_tier.hashes()
    return set(map(block_key, pool._block_of_hash)), set(map(block_key, host))


class Listener:
    """An index fed with what one router has heard of one node."""

    def __init__(self, node: AttachedNode) -> None:
        self.node = node
        self.intake = KVIntake(RouterCoreConfig())
        self.holdings = self.intake.add_node(node.description.num_blocks, 0.0)
        self.num_taken = 0

    def knows(self, engine: SimEngine) -> bool:
        """Whether all that was heard so far adds up to what the engine holds."""
        for event in self.node.kv_events[self.num_taken :]:
            assert not self.intake.apply(self.holdings, event, 0.0), "an event was missing"
        self.num_taken = len(self.node.kv_events)
        device, host = held_by(engine)
        index = self.intake.index
        return (
            self.holdings.is_in_step
            and all(index.match_prefix([key]).device[0] for key in device)
            and all(index.match_prefix([key]).either[0] for key in host)
            and index.num_entries == len(device) + len(host)
        )


async def serve(router: FakeRouter, p: AttachedNode, d: AttachedNode, address: str, seeds: range) -> None:
    """One request after another, on this pair; `address` is where the decode node receives."""
    for seed in seeds:
        attempt, request = AttemptId(seed), request_of(seed % 5, 100, 40)
        d.send(ReserveDecode(attempt, request))
        p.send(StartPrefill(attempt, request, address))
        await until_ended(router, attempt, p, d)


async def until_ended(router: FakeRouter, attempt: AttemptId, *nodes: AttachedNode) -> None:
    await router.until(lambda: all(node.terminals(attempt) for node in nodes))


async def test_every_router_can_build_the_same_index(workshop: Workshop) -> None:
    routers = [await workshop.router() for _ in range(2)]
    addresses = [router.address for router in routers]
    p = await workshop.node(Role.PREFILL, addresses, engine=small_engine())
    d = await workshop.node(Role.DECODE, addresses, engine=small_engine())
    ends = [(await router.node(p.node_id), await router.node(d.node_id)) for router in routers]
    listeners = [(Listener(at_p), Listener(at_d)) for at_p, at_d in ends]
    await serve(routers[0], *ends[0], d.transfer_address, range(1, 8))

    engines = workshop.engines
    for router, (at_p, at_d) in zip(routers, listeners, strict=True):
        await router.until(lambda at_p=at_p: at_p.knows(engines[p.node_id]))  # type: ignore[misc]
        await router.until(lambda at_d=at_d: at_d.knows(engines[d.node_id]))  # type: ignore[misc]
    device, host = held_by(engines[p.node_id])
    assert device
    assert host - device, "nothing was evicted"


async def test_keys_of_a_prompt_and_its_answer_are_found_on_the_nodes_that_made_them(
    workshop: Workshop,
) -> None:
    router = await workshop.router()
    p = await workshop.node(Role.PREFILL, [router.address])
    d = await workshop.node(Role.DECODE, [router.address])
    at_p, at_d = await router.node(p.node_id), await router.node(d.node_id)
    know_p, know_d = Listener(at_p), Listener(at_d)
    await serve(router, at_p, at_d, d.transfer_address, range(1, 2))
    await router.until(lambda: know_p.knows(workshop.engines[p.node_id]))
    await router.until(lambda: know_d.knows(workshop.engines[d.node_id]))

    request = request_of(1, 100, 40)
    answer = {**at_p.tokens[1], **at_d.tokens[1]}
    conversation = (*request.token_ids, *(answer[index] for index in range(40)))
    keys = PromptBlocks(conversation).keys(BLOCK_SIZE, at_p.description.fingerprint.digest)
    for listener, num_blocks in ((know_p, 100 // BLOCK_SIZE), (know_d, 139 // BLOCK_SIZE)):
        assert listener.intake.index.match_prefix(keys).device[0] == num_blocks


async def test_a_snapshot_comes_when_it_is_asked_for_and_holds_everything(workshop: Workshop) -> None:
    router = await workshop.router()
    p = await workshop.node(Role.PREFILL, [router.address], engine=small_engine())
    d = await workshop.node(Role.DECODE, [router.address])
    at_p, at_d = await router.node(p.node_id), await router.node(d.node_id)
    await serve(router, at_p, at_d, d.transfer_address, range(1, 8))
    at_p.kv_events.clear()
    late = Listener(at_p)
    at_p.send(SendKVSnapshot())
    await router.until(lambda: any(event.changes.cleared for event in at_p.kv_events))
    begin = next(i for i, event in enumerate(at_p.kv_events) if event.changes.cleared)
    del at_p.kv_events[:begin]
    await router.until(lambda: late.knows(workshop.engines[p.node_id]))


async def test_a_node_that_attaches_anew_begins_with_all_it_holds(workshop: Workshop) -> None:
    router = await workshop.router()
    p = await workshop.node(Role.PREFILL, [router.address], engine=small_engine())
    d = await workshop.node(Role.DECODE, [router.address])
    at_p, at_d = await router.node(p.node_id), await router.node(d.node_id)
    await serve(router, at_p, at_d, d.transfer_address, range(1, 8))
    await router.stop()
    await router.until(lambda: at_p.is_gone)
    await router.start()
    again = Listener(await router.node(p.node_id))
    await router.until(lambda: again.knows(workshop.engines[p.node_id]))


async def test_heartbeats_confirm_that_nothing_is_missing(workshop: Workshop) -> None:
    router = await workshop.router()
    p = await workshop.node(Role.PREFILL, [router.address])
    at_p = await router.node(p.node_id)
    await router.until(lambda: len(at_p.kv_events) >= 3)
    listener = Listener(at_p)
    await router.until(lambda: listener.knows(workshop.engines[p.node_id]))
    assert at_p.kv_events[-1].changes.num_keys == 0
