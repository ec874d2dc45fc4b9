"""A seeded cluster of fake nodes on a virtual clock: whatever fails whenever, the books stay right.

After every event: the core's invariants, and each stream a prefix of the one right answer. At the end:
every request ended, no node holds anything, the books are empty. To repeat a failure:
``SIMULATION_SEED=<seed> pytest tests/router/test_core_simulation.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random

import pytest

from kvrelay.core.errors import UnknownRequest
from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.node_messages import (
    DrainStarted,
    NodeDescription,
    Role,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.core.service_terms import Priority, ServiceTerms
from kvrelay.router.config import PLACEMENTS, Placement, RouterCoreConfig
from kvrelay.router.core import RouterCore
from kvrelay.router.events import (
    DeliverFailed,
    DeliverFinished,
    DeliverTokens,
    Event,
    RequestCancelled,
    RequestSatisfied,
    RequestSubmitted,
    SendCommand,
    SessionClosed,
    SessionId,
    Ticked,
)
from kvrelay.router.fleet_policy import FleetPolicy
from kvrelay.router.kv_intake import KVIntake
from kvrelay.router.policies import make_policy
from tests.router.pulling_policy import PullsAtRandom

from .fake_model import CONTEXT_TOKENS, EOS, right_answer
from .fake_node import FakeNode

NUM_SEEDS = 80
FINGERPRINT = KVFingerprint("m", "float32", 1, 1, 4, "rope")
SEEDS = [int(os.environ["SIMULATION_SEED"])] if "SIMULATION_SEED" in os.environ else range(NUM_SEEDS)


@dataclass
class Client:
    """One request as its caller sees it."""

    request: TokenRequest
    answer: list[int]
    reason: FinishReason
    output: list[int]
    may_fail_by: set[str]
    end: str = ""
    is_satisfied: bool = False


class World:
    """Clock, nodes, clients and the core under test."""

    def __init__(self, seed: int, placement: Placement = "kvrelay") -> None:
        self.rng = Random(seed)
        self.now_s = 0.0
        self.counter = count()
        self.todo: list[tuple[float, int, Callable[[], None]]] = []
        self.clients: dict[tuple[int, int], Client] = {}
        self.num_steady_steps = 0
        self.num_pulls = 0
        self.num_pulls_done = 0
        self.num_satisfied = 0
        self.num_explained = 0
        rate = self.rng.choice([0.0, 0.02, 0.1])
        self.chances = {"fail": rate / 3, "refuse": rate, "push": rate, "lose_kv": rate}
        config = RouterCoreConfig(
            growth_tokens=8, max_early_tokens=64, max_attempts=6, node_wait_s=3.0, queue_timeout_s=20.0,
            max_queued_requests=self.rng.choice([4, 100]), max_prefill_tokens_per_node=64,
        )  # fmt: skip
        kv = KVIntake(config)
        self.policy = make_policy(placement, kv.index)
        self.core = RouterCore(config, seed, PullsAtRandom(self.policy), Random(seed), kv)
        self.nodes = {
            name: FakeNode(self, self._describe(name))
            for name in ["p0", "p1", "p2"][: self.rng.randint(1, 3)]
            + ["d0", "d1", "d2"][: self.rng.randint(1, 3)]
        }

    def _describe(self, name: str) -> NodeDescription:
        role = Role.PREFILL if name.startswith("p") else Role.DECODE
        return NodeDescription(
            node_id=NodeId(name), incarnation=0, role=role, model="m", engine="sim", fingerprint=FINGERPRINT,
            vocab_size=100, max_model_len=CONTEXT_TOKENS, num_blocks=self.rng.randint(12, 40), block_size=4,
            max_num_seqs=self.rng.randint(1, 8), eos_token_ids=(EOS,), transfer_address=name,
        )  # fmt: skip

    def delay_s(self) -> float:
        return self.rng.expovariate(1 / 0.02)

    def chance(self, kind: str) -> bool:
        return self.rng.random() < self.chances[kind]

    def at(self, time_s: float, step: Callable[[], None]) -> None:
        heappush(self.todo, (time_s, next(self.counter), step))

    def after(self, delay_s: float, step: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, step)

    # ---- the plot

    def run(self, num_requests: int, num_incidents: int) -> None:
        for node in self.nodes.values():
            self.after(self.rng.uniform(0, 0.5), node.attach)
        for number in range(num_requests):
            self.at(self.rng.uniform(0.7, 4.0), lambda number=number: self._submit(number))  # type: ignore[misc]
        for _ in range(num_incidents):
            self.at(self.rng.uniform(0.5, 6.0), self._incident)
        self._play(until_s=8.0)
        self.chances = dict.fromkeys(self.chances, 0.0)
        self._play(until_s=40.0)

    def _play(self, until_s: float) -> None:
        self._every(0.2, until_s, lambda: self.handle(Ticked()))
        for node in self.nodes.values():
            self._every(self.rng.uniform(0.01, 0.03), until_s, node.step)
        while self.todo and self.todo[0][0] <= until_s:
            self.now_s, _, step = heappop(self.todo)
            step()
        self.now_s = until_s

    def _every(self, period_s: float, until_s: float, step: Callable[[], None]) -> None:
        def again() -> None:
            step()
            if self.now_s + period_s <= until_s:
                self.after(period_s, again)

        self.after(period_s, again)

    def _submit(self, number: int) -> None:
        rng = self.rng
        prompt = tuple(rng.randrange(40) for _ in range(rng.randint(1, 20)))
        sampling = SamplingParams(
            max_tokens=rng.choice([1, 2, 5, 20, 60]),
            temperature=rng.choice([0.0, 1.0]),
            seed=number,
            stop_token_ids=(11,) if rng.random() < 0.3 else (),
            ignore_eos=rng.random() < 0.3,
        )
        answer, reason = right_answer(TokenRequest(prompt, len(prompt), sampling))
        known = rng.randint(0, len(answer)) if rng.random() < 0.2 else 0
        request = TokenRequest(prompt + tuple(answer[:known]), len(prompt), sampling)
        session, deadline_s = rng.randint(1, 3), None
        client = Client(
            request, answer, reason, answer[:known], {"OVERLOADED", "NODE_UNAVAILABLE", "TRANSFER_FAILED"}
        )
        if rng.random() < 0.15:
            deadline_s = self.now_s + rng.uniform(-0.01, 0.5)
            client.may_fail_by.add("DEADLINE_EXCEEDED")
        if any(self.chances.values()):
            client.may_fail_by |= {"ENGINE_FAILED", "TRANSFER_TIMEOUT"}
        if rng.random() < 0.15:
            client.may_fail_by.add("CANCELLED")
            self.after(rng.uniform(0, 0.6), lambda: self.handle(RequestCancelled(RequestId(f"r{number}"))))
        if rng.random() < 0.15:
            self.after(rng.uniform(0, 0.6), lambda: self._satisfy(client, RequestId(f"r{number}")))
        terms = self._terms(client, Random(number))
        self.clients[session, number] = client
        name = RequestId(f"r{number}")
        self.handle(RequestSubmitted(name, SessionId(session), number, "m", request, deadline_s, terms))

    def _terms(self, client: Client, rng: Random) -> ServiceTerms:
        ttft_timeout_s = None
        if rng.random() < 0.15:
            ttft_timeout_s = rng.uniform(0.01, 0.5)
            client.may_fail_by |= {"DEADLINE_EXCEEDED", "OVERLOADED"}
        return ServiceTerms(rng.choice(list(Priority)), rng.choice(["", "a", "b"]), ttft_timeout_s)

    def _satisfy(self, client: Client, name: RequestId) -> None:
        """Its caller has all it wants: it ends at once, and well."""
        was_live, client.is_satisfied = not client.end, True
        self.handle(RequestSatisfied(name))
        if was_live:
            assert client.end == "satisfied"
            self.num_satisfied += 1

    def _incident(self) -> None:
        if self.rng.random() < 0.1:
            session = self.rng.randint(1, 3)
            for (owner, _), client in self.clients.items():
                if owner == session and not client.end:
                    client.end = "abandoned"
            self.handle(SessionClosed(SessionId(session)))
            return
        node = self.rng.choice(list(self.nodes.values()))
        if not node.is_up or node.is_draining:
            return
        if self.rng.random() < 0.25:
            node.is_draining = True
            node.say(DrainStarted())
            self._leave_when_done(node)
            return
        node.go_down("crash", says_so=self.rng.random() < 0.7)
        self.after(self.rng.uniform(0.0, 1.5), node.attach)

    def _leave_when_done(self, node: FakeNode) -> None:
        if node.held or node.sends.prefixes:
            node.later(lambda: self._leave_when_done(node))
            return
        node.go_down("drained", says_so=True)
        self.after(1.0, node.attach)

    # ---- what comes back

    def handle(self, event: Event) -> None:
        effects = self.core.handle(event, self.now_s)
        self.core.check_invariants()
        for effect in effects:
            if isinstance(effect, SendCommand):
                node = self.nodes[effect.node_id]
                if node.is_connected:
                    node.hear(effect.command)
            elif isinstance(effect, DeliverTokens):
                self._take_tokens(effect)
            else:
                self._take_end(effect)

    def _take_tokens(self, effect: DeliverTokens) -> None:
        start = 0
        for stream_id, num_tokens in zip(effect.stream_ids, effect.counts, strict=True):
            client = self.clients[effect.session, stream_id]
            assert not client.end, f"tokens after the end ({client.end})"
            client.output += effect.token_ids[start : start + num_tokens]
            start += num_tokens
            assert client.output == client.answer[: len(client.output)]
        assert start == len(effect.token_ids)

    def _take_end(self, effect: DeliverFinished | DeliverFailed) -> None:
        client = self.clients[effect.session, effect.stream_id]
        assert not client.end, f"ended twice: {client.end}, {effect}"
        if isinstance(effect, DeliverFailed):
            client.end = effect.error.code
            assert client.end in client.may_fail_by, effect.error
        elif client.is_satisfied:
            client.end = "satisfied"
            assert effect.finish_reason is FinishReason.STOP
            assert effect.report.num_output_tokens == len(client.output)
        else:
            client.end = "finished"
            assert client.output == client.answer
            assert effect.finish_reason == client.reason
        self._check_explained(effect, len(client.output))

    def _check_explained(self, effect: DeliverFinished | DeliverFailed, num_output_tokens: int) -> None:
        """What is remembered of a request that was placed is what its client was told."""
        try:
            measured = self.core.explain(effect.request_id, self.now_s).measured
        except UnknownRequest:
            assert isinstance(effect, DeliverFailed) or not effect.report.prefill_node
            return
        self.num_explained += 1
        assert measured.num_output_tokens == num_output_tokens
        if isinstance(effect, DeliverFailed):
            assert (measured.state, measured.error_code) == ("failed", effect.error.code)
            return
        report = effect.report
        assert (measured.state, measured.finish_reason) == ("done", effect.finish_reason)
        assert (measured.queue_s, measured.total_s) == (report.queue_s, report.total_s)
        assert (measured.num_cached_tokens or 0, measured.kv_bytes) == (
            report.num_cached_tokens,
            report.kv_bytes,
        )


def check_end(world: World) -> None:
    unended = [key for key, client in world.clients.items() if not client.end]
    assert not unended, f"requests without an end: {unended}"
    assert {node.node_id: node.held for node in world.nodes.values() if node.held} == {}
    assert not any(node.sends.prefixes for node in world.nodes.values())
    status = world.core.status(world.now_s)
    assert not any(status.num_requests_by_state.values())
    assert status.num_unsettled_attempts == status.num_sessions == 0
    for node in status.nodes:
        assert (node.num_in_flight, node.outstanding_prefill_tokens, node.reserved_blocks) == (0, 0, 0)
        assert not node.is_index_stale
    if isinstance(world.policy, FleetPolicy):
        assert world.policy.num_tracked == 0
    check_index(world)


def check_index(world: World) -> None:
    """It holds what the nodes do, and nothing else."""
    attached = [node for node in world.nodes.values() if node.is_connected]
    cluster = world.core._cluster
    for node in attached:
        slot = cluster.nodes[node.description.node_id].slot
        for key in node.cache.keys:
            assert cluster.block_index.match_prefix([key]).device[slot] == 1
    assert cluster.block_index.num_entries == sum(len(node.cache.keys) for node in attached)


def play(
    seed: int, num_requests: int = 40, num_incidents: int = 8, placement: Placement = "kvrelay"
) -> World:
    world = World(seed, placement)
    try:
        world.run(num_requests, num_incidents)
        check_end(world)
    except Exception as error:
        error.add_note(f"at {world.now_s:.3f} s with SIMULATION_SEED={seed}")
        raise
    return world


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_fails_tokens_are_exact_and_books_end_empty(seed: int) -> None:
    play(seed)


@pytest.mark.parametrize("seed", SEEDS[:15])
@pytest.mark.parametrize("placement", PLACEMENTS[1:])
def test_the_other_policies_keep_the_books_too(placement: Placement, seed: int) -> None:
    play(seed, placement=placement)


def test_without_faults_every_request_is_answered() -> None:
    world = World(1)
    world.chances = dict.fromkeys(world.chances, 0.0)
    world.run(num_requests=40, num_incidents=0)
    check_end(world)
    expected_ends = {"finished", "satisfied", "CANCELLED", "DEADLINE_EXCEEDED", "OVERLOADED"}
    assert {client.end for client in world.clients.values()} <= expected_ends
    assert sum(client.end == "finished" for client in world.clients.values()) >= 20


def test_the_simulation_meets_continuations_losses_refusals_steady_steps_and_satisfied_callers() -> None:
    worlds = [play(seed) for seed in range(12)]
    counters = [world.core.status(0.0).counters for world in worlds]
    assert sum(found.num_continuations for found in counters) > 10
    assert sum(found.num_nodes_lost for found in counters) > 5
    assert sum(found.num_attempts_refused for found in counters) > 5
    assert sum(found.num_tokens_dropped for found in counters) > 0
    assert sum(world.num_steady_steps for world in worlds) > 500
    assert sum(world.num_satisfied for world in worlds) > 20
    assert sum(world.num_explained for world in worlds) > 100
    assert sum(world.num_pulls for world in worlds) > 50
    assert sum(world.num_pulls_done for world in worlds) > 30
    assert sum(found.num_pulled_tokens for found in counters) > 200
    assert sum(found.num_kv_events for found in counters) > 500
    assert sum(found.num_kv_gaps for found in counters) > 20
    assert sum(world.core.status(0.0).index.num_entries for world in worlds) > 100
