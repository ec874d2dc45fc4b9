"""Fake nodes for the simulation: no KV, no model, but the whole node contract, with delays and faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Protocol

from kvrelay.codec.cluster import TokenBatchDecoder, TokenBatchEncoder
from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    Command,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    NodeLoad,
    PrefillFinished,
    PullOrder,
    ReleaseKV,
    Report,
    SendKVSnapshot,
    SendPrefix,
    StartPrefill,
    StopPull,
    TokenBatch,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.router.events import Event, NodeAttached, NodeLost, NodeReported
from tests.router.fake_cache import FakeCache
from tests.router.fake_model import finish_reason, next_token
from tests.router.fake_sends import FakeSends


class FakeWorld(Protocol):
    """What a fake node lives in."""

    now_s: float
    rng: Random
    num_steady_steps: int
    num_pulls: int
    num_pulls_done: int

    @property
    def nodes(self) -> Mapping[str, FakeNode]: ...

    def delay_s(self) -> float: ...

    def chance(self, kind: str) -> bool: ...

    def at(self, time_s: float, step: Callable[[], None]) -> None: ...

    def after(self, delay_s: float, step: Callable[[], None]) -> None: ...

    def handle(self, event: Event) -> None: ...


@dataclass
class Held:
    """What a fake node holds for one attempt."""

    request: TokenRequest
    output: list[int]
    decode_node: str = ""
    is_decoding: bool = False
    pull: PullOrder | None = None
    num_pulled_tokens: int = 0


@dataclass
class FakeNode:
    """Keeps the node contract: each command that makes it hold something ends in one terminal report."""

    world: FakeWorld
    description: NodeDescription
    is_up: bool = False
    is_connected: bool = False
    is_draining: bool = False
    held: dict[AttemptId, Held] = field(default_factory=dict)
    sends: FakeSends = field(init=False)
    arrived: set[AttemptId] = field(default_factory=set)
    seen: set[AttemptId] = field(default_factory=set)
    life: int = 0
    sent_until_s: float = 0.0
    heard_until_s: float = 0.0
    encoder: TokenBatchEncoder = field(default_factory=TokenBatchEncoder)
    decoder: TokenBatchDecoder = field(default_factory=TokenBatchDecoder)
    cache: FakeCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = FakeCache(self.description)
        self.sends = FakeSends(self)

    @property
    def node_id(self) -> str:
        return self.description.node_id

    # ---- connection

    def attach(self) -> None:
        self.is_up, self.is_draining = True, False
        self.description = replace(self.description, incarnation=self.description.incarnation + 1)
        self.encoder, self.decoder = TokenBatchEncoder(), TokenBatchDecoder()
        self.cache.begin_stream()
        life, event = self.life, NodeAttached(self.description)

        def arrive() -> None:
            # What the router says before it has read the hello goes to the stream before, into the void.
            self.is_connected = self.life == life
            self.world.handle(event)

        self._later_at_router(arrive)

    def go_down(self, reason: str, *, says_so: bool) -> None:
        """Crash, leave or lose the connection; a router may learn of it only by the next attachment."""
        self.is_up = self.is_connected = False
        self.life += 1
        self.held.clear()
        self.sends.prefixes.clear()
        self.arrived.clear()
        if self.world.rng.random() < 0.5:  # else only the connection broke
            self.cache = FakeCache(self.description)
        if says_so:
            self._to_router(NodeLost(NodeId(self.node_id), self.description.incarnation, reason))

    def _to_router(self, event: Event) -> None:
        self._later_at_router(lambda: self.world.handle(event))

    def _later_at_router(self, arrive: Callable[[], None]) -> None:
        self.sent_until_s = max(self.sent_until_s, self.world.now_s + self.world.delay_s())
        self.world.at(self.sent_until_s, arrive)

    def say(self, *reports: Report, tokens: TokenBatch | None = None) -> None:
        load = NodeLoad(num_running=len(self.held)) if self.world.rng.random() < 0.5 else None
        if tokens is not None:
            tokens = self.decoder.decode(self.encoder.encode(tokens))
            self.world.num_steady_steps += tokens.step > 0
        kv = self.cache.next_event(is_load_told=load is not None)
        if kv is not None and self.world.chance("lose_kv"):
            kv = None
        self._to_router(NodeReported(NodeId(self.node_id), tokens, reports, load, kv))

    def hear(self, command: Command) -> None:
        """Commands come in order, after a delay; those of an earlier connection never."""
        life = self.life
        self.heard_until_s = max(self.heard_until_s, self.world.now_s + self.world.delay_s())
        self.world.at(self.heard_until_s, lambda: self._act(command) if life == self.life else None)

    def later(self, step: Callable[[], None]) -> None:
        life = self.life
        self.world.after(self.world.delay_s(), lambda: step() if life == self.life else None)

    # ---- work

    def _act(self, command: Command) -> None:
        if isinstance(command, SendKVSnapshot):
            self.cache.send_snapshot()
            return
        attempt = command.attempt
        if isinstance(command, StopPull):
            self._stop_pull(attempt)
            return
        if isinstance(command, ReleaseKV):
            self.held.pop(attempt, None)
            self.sends.prefixes.pop(attempt, None)
            self.arrived.discard(attempt)
            self.say(KVReleased(attempt))
            return
        assert attempt not in self.seen, f"attempt {attempt} reused on {self.node_id}"
        self.seen.add(attempt)
        if self.is_draining or self.world.chance("refuse") or len(self.held) >= 6:
            self.say(AttemptRefused(attempt, "OVERLOADED", "no room"))
            return
        if isinstance(command, SendPrefix):
            self.sends.start(command)
            return
        request = command.request
        self.held[attempt] = Held(request, list(request.token_ids[request.num_prompt_tokens :]))
        if isinstance(command, StartPrefill):
            self.held[attempt].decode_node = command.decode_address
            self.held[attempt].pull = command.pull
            if command.pull is None:
                self.later(lambda: self.prefill(attempt))
            else:
                self.world.num_pulls += 1
                life = self.life
                self.world.after(1.0, lambda: self._stop_pull(attempt) if life == self.life else None)
        else:
            self.later(lambda: self._verify(attempt))

    def _stop_pull(self, attempt: AttemptId) -> None:
        """Compute what has not come."""
        held = self.held.get(attempt)
        if held is not None and held.pull is not None:
            held.pull = None
            self.later(lambda: self.prefill(attempt))

    def fail(self, attempt: AttemptId, code: str) -> None:
        if self.held.pop(attempt, None) is not None:
            self.say(AttemptFailed(attempt, code, "it broke"))

    def prefill(self, attempt: AttemptId) -> None:
        held = self.held.get(attempt)
        if held is None:
            return
        if self.world.chance("fail"):
            self.fail(attempt, "ENGINE_FAILED")
            return
        index = len(held.output)
        held.output.append(next_token(held.request, held.output))
        tokens = TokenBatch([attempt], [index], [1], [held.output[-1]])
        self.cache.use(held.request.token_ids)
        reason = finish_reason(held.request, held.output)
        if reason is not None:
            del self.held[attempt]
            self.say(AttemptFinished(attempt, reason), tokens=tokens)
            return
        # The push may overtake the report: they go different ways.
        self.later(lambda: self._push(attempt))
        pulled = held.num_pulled_tokens
        self.say(PrefillFinished(attempt, pulled, 0.0, 0.0, pulled, 0.01), tokens=tokens)

    def _push(self, attempt: AttemptId) -> None:
        held = self.held.get(attempt)
        if held is None:
            return
        peer = self.world.nodes[held.decode_node]
        if not peer.is_up or self.world.chance("push"):
            self.fail(attempt, "TRANSFER_FAILED")
            peer.later(lambda: peer.fail(attempt, "TRANSFER_TIMEOUT"))
            return
        peer.arrived.add(attempt)
        peer.later(lambda: peer._verify(attempt))
        self.later(lambda: self._acknowledged(attempt))

    def _acknowledged(self, attempt: AttemptId) -> None:
        if self.held.pop(attempt, None) is not None:
            self.say(KVReleased(attempt))

    def _verify(self, attempt: AttemptId) -> None:
        held = self.held.get(attempt)
        if held is None or attempt not in self.arrived:
            return
        self.arrived.discard(attempt)
        held.is_decoding = True
        held.output.append(next_token(held.request, held.output))
        self.say(HandoffVerified(attempt, 10, 1, 0.1, "memory"))

    def step(self) -> None:
        """One engine step of a decode node: a token for each running sequence, in one frame; if there is
        none, perhaps a heartbeat."""
        if not self.is_up:
            return
        running = [attempt for attempt, held in self.held.items() if held.is_decoding]
        drawn: list[tuple[AttemptId, int, list[int]]] = []
        reports: list[Report] = []
        num_tokens = 1 if self.world.rng.random() < 0.8 else 3
        for attempt in running:
            if self.world.chance("fail"):
                del self.held[attempt]
                reports.append(AttemptFailed(attempt, "ENGINE_FAILED", "it broke"))
                continue
            held = self.held[attempt]
            first = len(held.output)
            reason = self._draw(held, num_tokens)
            drawn.append((attempt, first, held.output[first:]))
            if reason is not None:
                del self.held[attempt]
                self.cache.use([*held.request.token_ids[: held.request.num_prompt_tokens], *held.output])
                reports.append(AttemptFinished(attempt, reason))
        if running or self.world.rng.random() < 0.1:
            self.say(*reports, tokens=_batch(drawn) if running else None)

    def _draw(self, held: Held, num_tokens: int) -> FinishReason | None:
        reason = None
        for _ in range(num_tokens):
            held.output.append(next_token(held.request, held.output))
            reason = finish_reason(held.request, held.output)
            if reason is not None:
                break
        return reason


def _batch(drawn: list[tuple[AttemptId, int, list[int]]]) -> TokenBatch:
    return TokenBatch(
        attempts=[attempt for attempt, _, _ in drawn],
        start_indices=[first for _, first, _ in drawn],
        counts=[len(token_ids) for _, _, token_ids in drawn],
        token_ids=[token_id for _, _, token_ids in drawn for token_id in token_ids],
    )
