"""Nodes that say whatever a frame can hold: the router stays up, and what others serve stays right.

To repeat a failure: ``HOSTILE_SEED=<seed> pytest tests/router/test_hostile_node.py``.
"""

from __future__ import annotations

import os
from collections import Counter, UserDict
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from kvrelay.codec import client_api
from kvrelay.codec.cluster import TokenBatchDecoder, decode_node_frame
from kvrelay.core.client_types import CallFinished
from kvrelay.core.errors import InvalidRequest, UnknownRequest
from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import Command, NodeFrame, ReserveDecode, StartPrefill
from kvrelay.router.events import (
    DeliverFailed,
    DeliverFinished,
    DeliverTokens,
    Event,
    NodeAttached,
    NodeLost,
    NodeReported,
    SendCommand,
)
from kvrelay.router.state_report import cluster_state
from kvrelay.v1 import cluster_pb2
from tests.any_message import EXTREMES, any_message

from .fake_node import FakeNode
from .test_core_simulation import World

NUM_SEEDS = 20
SEEDS = [int(os.environ["HOSTILE_SEED"])] if "HOSTILE_SEED" in os.environ else range(NUM_SEEDS)
FRAMES_END_S = 12.0


class HostileNode:
    """Says hello as others do, and then anything: of its own attempts, of others', and of none. Its peers
    can't reach it."""

    is_up = False

    def __init__(self, world: HostileWorld, name: str) -> None:
        self.world = world
        self.description = world._describe(name)
        self.rng = Random(f"{world.seed} {name}")
        self.attempts: list[AttemptId] = []
        self.num_said: Counter[str] = Counter()

    def attach(self) -> None:
        self.decoder = TokenBatchDecoder()
        self.is_connected = True
        self.world.handle(NodeAttached(self.description))

    def hear(self, command: Command) -> None:
        if isinstance(command, StartPrefill | ReserveDecode):
            self.world.note_placed(command)
            self.attempts.append(command.attempt)

    def step(self) -> None:
        """One frame; one that can't be decoded ends the stream, as in the router's shell."""
        if not self.is_connected or self.world.now_s > FRAMES_END_S:
            return
        try:
            frame = decode_node_frame(self._frame(), self.decoder.decode)
        except InvalidRequest:
            self.num_said["refused"] += 1
            self.is_connected = False
            self.world.handle(
                NodeLost(NodeId(self.description.node_id), self.description.incarnation, "faulty")
            )
            self.world.after(0.01, self.attach)
            return
        self.num_said["taken"] += 1
        self._report(frame)

    def later(self, step: Callable[[], None]) -> None:
        """What a peer thinks that it does."""

    def leave(self) -> None:
        """It is found silent."""
        if self.is_connected:
            self.is_connected = False
            self.world.handle(
                NodeLost(NodeId(self.description.node_id), self.description.incarnation, "silent")
            )

    def _frame(self) -> cluster_pb2.NodeFrame:
        draws = {"attempt": self._attempt, "attempts": self._attempt, "counts": _count}
        draws |= {"first_indices": _count, "node_id": lambda rng: "d0"}
        frame = any_message(cluster_pb2.NodeFrame, self.rng, draws)
        frame.ClearField("tokenizer")
        frame.ClearField("hello")
        if frame.HasField("tokens") and self.rng.random() < 0.8:
            self._make_fit(frame.tokens)
        for report in frame.reports:
            report.attempt = report.attempt or 1
        return frame

    def _make_fit(self, tokens: cluster_pb2.TokenBatch) -> None:
        """Columns of one length, so that the core sees them; the numbers in them are anything."""
        tokens.same_rows = False
        del tokens.logprobs[:]
        num_rows = min(len(tokens.attempts), len(tokens.first_indices), len(tokens.counts))
        for column in (tokens.attempts, tokens.first_indices, tokens.counts):
            del column[num_rows:]
        flood = self.rng.choice((1, 1, 2, 500))
        tokens.counts[:] = [flood] * num_rows
        tokens.token_ids[:] = [self.rng.choice((0, 5, 2**31 - 1)) for _ in range(flood * num_rows)]

    def _attempt(self, rng: Random) -> int:
        """One of its own, one that a node of this router has, or any."""
        if self.attempts and rng.random() < 0.5:
            return rng.choice(self.attempts[-4:])
        if rng.random() < 0.7:
            return 1 + rng.randrange(max(1, self.world.num_attempts))
        return rng.choice(EXTREMES)

    def _report(self, frame: NodeFrame) -> None:
        node_id = NodeId(self.description.node_id)
        self.world.handle(NodeReported(node_id, frame.tokens, frame.reports, frame.load, frame.kv))


class Peers(UserDict[str, Any]):
    """The honest nodes; a hostile one is found, but not among them."""

    def __init__(self, honest: dict[str, FakeNode], hostile: dict[str, HostileNode]) -> None:
        super().__init__(honest)
        self._hostile = hostile

    def __missing__(self, name: str) -> HostileNode:
        return self._hostile[name]


def _count(rng: Random) -> int:
    return rng.choice((0, 1, 1, 2, 3, 100, 2**32 - 1))


class HostileWorld(World):
    """Some nodes more, which are hostile. What these were given may end in any way; nothing else may."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.seed = seed
        self.chances = dict.fromkeys(self.chances, 0.0)
        self.tainted: set[tuple[int, int]] = set()
        self.num_attempts = 0
        names = self.rng.choice((["px"], ["dx"], ["px", "dx"]))
        self.hostile = {name: HostileNode(self, name) for name in names}
        self.nodes = Peers(self.nodes, self.hostile)

    def note_placed(self, command: StartPrefill | ReserveDecode) -> None:
        entry = self.core._ledger.attempts[command.attempt].entry
        self.tainted.add((entry.session, entry.stream_id))

    def handle(self, event: Event) -> None:
        effects = self.core.handle(event, self.now_s)
        self.core.check_invariants()
        self.num_attempts = max(self.num_attempts, self.core._ledger.num_attempts_ever)
        for effect in effects:
            match effect:
                case SendCommand(node_id, command) if node_id in self.hostile:
                    self.hostile[node_id].hear(command)
                case SendCommand(node_id, command):
                    if self.nodes[node_id].is_connected:
                        self.nodes[node_id].hear(command)
                case DeliverTokens():
                    self._take_untainted(effect)
                case DeliverFinished() | DeliverFailed():
                    self._take_end(effect)
                    self._tell_of(effect)

    def _take_untainted(self, effect: DeliverTokens) -> None:
        """Each index once and in order for all, the right tokens for those that honest nodes alone served."""
        start = 0
        for stream_id, num_tokens in zip(effect.stream_ids, effect.counts, strict=True):
            key = (effect.session, stream_id)
            client = self.clients[key]
            assert not client.end, f"tokens after the end ({client.end})"
            client.output += effect.token_ids[start : start + num_tokens]
            start += num_tokens
            assert len(client.output) <= client.request.sampling.max_tokens
            if key not in self.tainted:
                assert client.output == client.answer[: len(client.output)]
        assert start == len(effect.token_ids)

    def _take_end(self, effect: DeliverFinished | DeliverFailed) -> None:
        if (effect.session, effect.stream_id) in self.tainted:
            client = self.clients[effect.session, effect.stream_id]
            assert not client.end, f"ended twice: {client.end}, {effect}"
            client.end = "satisfied" if client.is_satisfied else "tainted"
        else:
            super()._take_end(effect)

    def _tell_of(self, effect: DeliverFinished | DeliverFailed) -> None:
        """Whatever figures a node gave, clients and people can be told of them."""
        if isinstance(effect, DeliverFinished):
            client_api.encode_call_event(CallFinished(effect.finish_reason, effect.report))
        with suppress(UnknownRequest):
            client_api.encode_explanation(self.core.explain(effect.request_id, self.now_s))
        state = cluster_state(self.core.status(self.now_s), "r", self.now_s)
        told = client_api.encode_cluster_state(state)
        assert client_api.decode_cluster_state(told).counters.keys() == state.counters.keys()

    def run(self, num_requests: int, num_incidents: int) -> None:
        for node in self.hostile.values():
            self.after(0.1, node.attach)
            self.after(0.2, lambda node=node: self._every(0.02, FRAMES_END_S, node.step))  # type: ignore[misc]
            self.at(FRAMES_END_S + 1.0, node.leave)
        super().run(num_requests, num_incidents)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_that_a_node_says_breaks_the_router_or_what_others_serve(seed: int) -> None:
    world = HostileWorld(seed)
    world.run(num_requests=24, num_incidents=0)
    assert not [key for key, client in world.clients.items() if not client.end]
    assert all(node.num_said["taken"] > 20 for node in world.hostile.values())
    status = world.core.status(world.now_s)
    assert not any(status.num_requests_by_state.values())
    assert status.num_unsettled_attempts == status.num_sessions == 0
