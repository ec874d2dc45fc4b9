"""A router core with a transcript: every event returns its effects as short lines, the books checked."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import pytest

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVEvent
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    NodeLoad,
    PrefillFinished,
    ReleaseKV,
    Report,
    ReserveDecode,
    Role,
    SendKVSnapshot,
    SendPrefix,
    StartPrefill,
    StopPull,
    TokenBatch,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.router.config import Placement, RouterCoreConfig
from kvrelay.router.core import RouterCore
from kvrelay.router.events import (
    DeliverFailed,
    DeliverFinished,
    DeliverTokens,
    Effect,
    Event,
    NodeAttached,
    NodeLost,
    NodeReported,
    RequestCancelled,
    RequestSatisfied,
    RequestSubmitted,
    SendCommand,
    SessionClosed,
    SessionId,
    Ticked,
)
from kvrelay.router.kv_intake import KVIntake
from kvrelay.router.placement import PlacementPolicy
from kvrelay.router.policies import make_policy

FINGERPRINT = KVFingerprint("tiny", "float32", 2, 1, 4, "rope")


def describe_node(node_id: str, **changes: object) -> NodeDescription:
    """A node whose id starts with ``p`` (prefill) or ``d`` (decode)."""
    role = Role.PREFILL if node_id.startswith("p") else Role.DECODE
    description = NodeDescription(
        node_id=NodeId(node_id),
        incarnation=1,
        role=role,
        model="m",
        engine="sim",
        fingerprint=FINGERPRINT,
        vocab_size=1000,
        max_model_len=64,
        num_blocks=32,
        block_size=4,
        max_num_seqs=4,
        eos_token_ids=(2,),
        transfer_address=f"{node_id}:1" if role is Role.DECODE else "",
    )
    return replace(description, **changes)  # type: ignore[arg-type]


class Transcript:
    """Drives one core on a clock that the test sets."""

    def __init__(self, placement: Placement | PlacementPolicy = "least-loaded", **config: object) -> None:
        defaults: dict[str, object] = {
            "growth_tokens": 8,
            "max_early_tokens": 4,
            "max_attempts": 4,
            "retry_pause_s": 0.2,
        }
        self.config = RouterCoreConfig(**(defaults | config))  # type: ignore[arg-type]
        kv = KVIntake(self.config)
        policy = make_policy(placement, kv.index) if isinstance(placement, str) else placement
        self.core = RouterCore(self.config, 7, policy, Random(1), kv)
        self.now_s = 0.0
        self.checks_invariants = True
        self.effects: list[Effect] = []
        self.delivered: dict[tuple[int, int], list[int]] = {}

    # ---- events; each returns the lines of its effects

    def handle(self, event: Event) -> list[str]:
        self.effects = self.core.handle(event, self.now_s)
        if self.checks_invariants:
            self.core.check_invariants()
        return [line for effect in self.effects for line in self._lines(effect)]

    def attach(self, *node_ids: str, **changes: object) -> list[str]:
        lines = [self.handle(NodeAttached(describe_node(node_id, **changes))) for node_id in node_ids]
        return [line for of_node in lines for line in of_node]

    def lose(self, node_id: str, incarnation: int = 1) -> list[str]:
        return self.handle(NodeLost(NodeId(node_id), incarnation, "gone"))

    def submit(
        self,
        request_id: str = "r",
        prompt: tuple[int, ...] = (5, 6, 7),
        output: tuple[int, ...] = (),
        session: int = 1,
        stream_id: int = 1,
        model: str = "m",
        deadline_s: float | None = None,
        max_tokens: int = 4,
        **sampling: object,
    ) -> list[str]:
        params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
        request = TokenRequest(prompt + output, len(prompt), params)
        return self.handle(
            RequestSubmitted(RequestId(request_id), SessionId(session), stream_id, model, request, deadline_s)
        )

    def report(
        self,
        node_id: str,
        *reports: Report,
        tokens: TokenBatch | None = None,
        load: NodeLoad | None = None,
        kv: KVEvent | None = None,
    ) -> list[str]:
        return self.handle(NodeReported(NodeId(node_id), tokens, reports, load, kv))

    def tokens(self, node_id: str, attempt: int, index: int, *token_ids: int) -> list[str]:
        return self.report(node_id, tokens=batch((attempt, index, token_ids)))

    def first_token(
        self, attempt: int = 1, index: int = 0, token_id: int = 10, node_id: str = "p1"
    ) -> list[str]:
        """The prefill node's frame when it is done."""
        return self.report(node_id, prefilled(attempt), tokens=batch((attempt, index, (token_id,))))

    def verify(self, attempt: int = 1, node_id: str = "d1") -> list[str]:
        """The decode node has the KV, and the prefill node of the same number lets go."""
        return self.report(node_id, verified(attempt)) + self.report(
            node_id.replace("d", "p"), KVReleased(AttemptId(attempt))
        )

    def cancel(self, request_id: str = "r") -> list[str]:
        return self.handle(RequestCancelled(RequestId(request_id)))

    def satisfy(self, request_id: str = "r") -> list[str]:
        """The caller has all it wants."""
        return self.handle(RequestSatisfied(RequestId(request_id)))

    def close_session(self, session: int = 1) -> list[str]:
        return self.handle(SessionClosed(SessionId(session)))

    def tick(self, now_s: float) -> list[str]:
        self.now_s = now_s
        return self.handle(Ticked())

    # ---- what is seen

    def state(self) -> dict[str, int]:
        """How many requests are in each state, zeros left out."""
        counts = self.core.status(self.now_s).num_requests_by_state
        return {str(state): count for state, count in counts.items() if count}

    def node(self, node_id: str) -> object:
        nodes = self.core.status(self.now_s).nodes
        return next(node for node in nodes if node.description.node_id == node_id)

    def error(self) -> KVRelayError:
        """The error that the last event delivered."""
        return next(effect.error for effect in self.effects if isinstance(effect, DeliverFailed))

    def assert_books_empty(self) -> None:
        status = self.core.status(self.now_s)
        assert not any(status.num_requests_by_state.values())
        assert status.num_unsettled_attempts == status.num_sessions == 0
        for node in status.nodes:
            assert (node.num_in_flight, node.outstanding_prefill_tokens, node.reserved_blocks) == (0, 0, 0)

    def _lines(self, effect: Effect) -> Iterator[str]:
        if isinstance(effect, SendCommand):
            yield f"{effect.node_id} <- {_command(effect)}"
        elif isinstance(effect, DeliverTokens):
            yield from self._token_lines(effect)
        elif isinstance(effect, DeliverFinished):
            yield f"{effect.session}.{effect.stream_id} finished: {effect.finish_reason}"
        else:
            yield f"{effect.session}.{effect.stream_id} failed: {effect.error.code}"

    def _token_lines(self, effect: DeliverTokens) -> Iterator[str]:
        start = 0
        for stream_id, count in zip(effect.stream_ids, effect.counts, strict=True):
            token_ids = effect.token_ids[start : start + count]
            start += count
            self.delivered.setdefault((effect.session, stream_id), []).extend(token_ids)
            yield f"{effect.session}.{stream_id} += {' '.join(map(str, token_ids))}"
        assert start == len(effect.token_ids)


def _command(effect: SendCommand) -> str:
    match effect.command:
        case StartPrefill(attempt, request, address, pull):
            pulled = f", {pull.num_tokens} tokens as {pull.attempt}" if pull else ""
            return f"prefill {attempt} {list(request.token_ids)} to {address}{pulled}"
        case SendPrefix(attempt, prefix, address):
            return f"send {attempt} {list(prefix.token_ids)} to {address}"
        case StopPull(attempt):
            return f"stop pull {attempt}"
        case ReserveDecode(attempt, request):
            return f"reserve {attempt} {list(request.token_ids)}"
        case ReleaseKV(attempt):
            return f"release {attempt}"
        case SendKVSnapshot():
            return "send a KV snapshot"


def batch(*entries: tuple[int, int, tuple[int, ...]]) -> TokenBatch:
    """Of (attempt, first index, token ids)."""
    return TokenBatch(
        attempts=[attempt for attempt, _, _ in entries],
        start_indices=[index for _, index, _ in entries],
        counts=[len(token_ids) for _, _, token_ids in entries],
        token_ids=[token_id for _, _, token_ids in entries for token_id in token_ids],
    )


def prefilled(attempt: int) -> PrefillFinished:
    return PrefillFinished(AttemptId(attempt), num_cached_tokens=1, queue_s=0.0, compute_s=0.1)


def verified(attempt: int) -> HandoffVerified:
    return HandoffVerified(
        AttemptId(attempt), num_bytes=100, num_messages=2, seconds=0.01, transport="memory"
    )


class Say:
    """Reports by attempt number, for short tests."""

    prefilled = staticmethod(prefilled)
    verified = staticmethod(verified)
    batch = staticmethod(batch)
    describe_node = staticmethod(describe_node)

    @staticmethod
    def released(attempt: int) -> KVReleased:
        return KVReleased(AttemptId(attempt))

    @staticmethod
    def refused(attempt: int, code: str = "OVERLOADED", field: str = "") -> AttemptRefused:
        return AttemptRefused(AttemptId(attempt), code, "no room", field)

    @staticmethod
    def failed(attempt: int, code: str = "ENGINE_FAILED") -> AttemptFailed:
        return AttemptFailed(AttemptId(attempt), code, "it broke")

    @staticmethod
    def finished(attempt: int, reason: FinishReason = FinishReason.LENGTH) -> AttemptFinished:
        return AttemptFinished(AttemptId(attempt), reason)


@pytest.fixture
def say() -> type[Say]:
    return Say


@pytest.fixture
def new_transcript() -> Callable[..., Transcript]:
    """For tests that need a configuration of their own."""
    return Transcript


@pytest.fixture
def cluster() -> Transcript:
    """One prefill node p1, one decode node d1."""
    transcript = Transcript()
    transcript.attach("p1", "d1")
    return transcript
