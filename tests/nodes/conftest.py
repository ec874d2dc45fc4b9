"""What the tests of nodes share: a core under test that remembers what it said, and short names."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvrelay.core.errors import TransferFailed
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    Command,
    KVReleased,
    PullOrder,
    ReleaseKV,
    Report,
    ReserveDecode,
    SendPrefix,
    StartPrefill,
    StopPull,
    Welcome,
)
from kvrelay.core.request import FinishReason, Prefix, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.decode_node.core import DecodeNodeCore
from kvrelay.engine.interface import Reservation, SequenceKey, SequenceOutput, StepOutput
from kvrelay.kv_transfer.interface import PushDone, PushFailed, ReceiveDone, ReceiveFailed, TransferStats
from kvrelay.node.attempt import AttemptState, sequence_key
from kvrelay.node.core import NodeCore, NodeCoreConfig
from kvrelay.node.events import (
    NodeEffect,
    NodeEvent,
    PrefixHeld,
    RouterConnected,
    RouterFrameReceived,
    SendFrame,
    SequenceReserved,
    StepFinished,
)
from kvrelay.prefill_node.core import PrefillNodeCore

EPOCH = 7
LEASE_S = 3.0
TERMINAL = (AttemptRefused, AttemptFinished, AttemptFailed, KVReleased)


def make_request(num_tokens: int = 5, max_tokens: int = 8) -> TokenRequest:
    return TokenRequest(tuple(range(1, num_tokens + 1)), num_tokens, SamplingParams(max_tokens=max_tokens))


class CoreUnderTest:
    """Drives a core: calls return the effects; frames are taken apart into `reports` and `tokens`."""

    def __init__(self, core: NodeCore) -> None:
        self.core = core
        self.now_s = 100.0
        self.reports: list[tuple[int, Report]] = []
        self.tokens: list[tuple[int, int, int, int]] = []

    def tell(self, event: NodeEvent) -> list[NodeEffect]:
        """Effects but frames, which are added to `reports` and `tokens`: (epoch, attempt, index, token)."""
        effects: list[NodeEffect] = []
        for effect in self.core.handle(event, self.now_s):
            if isinstance(effect, SendFrame):
                self._take_frame(effect)
            else:
                effects.append(effect)
        return effects

    def _take_frame(self, frame: SendFrame) -> None:
        columns = frame.tokens
        if columns is not None:
            assert set(columns.counts) == {1}
            rows = zip(columns.attempts, columns.first_indices, columns.token_ids, strict=True)
            self.tokens += [(frame.router_epoch, *row) for row in rows]
        self.reports += [(frame.router_epoch, report) for report in frame.reports]

    def take_reports(self) -> list[Report]:
        """What was reported since the last call, to `EPOCH`."""
        taken = [report for epoch, report in self.reports if epoch == EPOCH]
        self.reports.clear()
        return taken

    def connect(self, epoch: int = EPOCH) -> list[NodeEffect]:
        return self.tell(RouterConnected(Welcome("r", epoch, 1.0, LEASE_S)))

    def command(self, *commands: Command, epoch: int = EPOCH) -> list[NodeEffect]:
        return self.tell(RouterFrameReceived(epoch, commands))

    def release(self, attempt: int = 1) -> list[NodeEffect]:
        return self.command(ReleaseKV(AttemptId(attempt)))

    def prefill(self, attempt: int = 1, epoch: int = EPOCH) -> list[NodeEffect]:
        return self.command(StartPrefill(AttemptId(attempt), make_request(), "d:1"), epoch=epoch)

    def reserve(self, attempt: int = 1, epoch: int = EPOCH) -> list[NodeEffect]:
        return self.command(ReserveDecode(AttemptId(attempt), make_request()), epoch=epoch)

    def prefill_with_pull(self, attempt: int = 1, pull: int = 9, num_tokens: int = 4) -> list[NodeEffect]:
        order = PullOrder(AttemptId(pull), num_tokens)
        return self.command(StartPrefill(AttemptId(attempt), make_request(), "d:1", order))

    def send_prefix(self, attempt: int = 9, num_tokens: int = 4, epoch: int = EPOCH) -> list[NodeEffect]:
        prefix = Prefix(tuple(range(1, num_tokens + 1)))
        return self.command(SendPrefix(AttemptId(attempt), prefix, "p:1"), epoch=epoch)

    def stop_pull(self, attempt: int = 1) -> list[NodeEffect]:
        return self.command(StopPull(AttemptId(attempt)))

    def prefix_held(self, attempt: int = 9, num_cached_tokens: int = 0) -> list[NodeEffect]:
        """The engine has pinned or reserved what belongs to that transfer."""
        return self.tell(PrefixHeld(Reservation(key_of(attempt), (BlockId(3),), num_cached_tokens)))

    def reserved(self, attempt: int = 1, num_cached_tokens: int = 0) -> list[NodeEffect]:
        return self.tell(SequenceReserved(Reservation(key_of(attempt), (BlockId(3),), num_cached_tokens)))

    def token(
        self, attempt: int = 1, index: int = 0, token_id: int = 42, finish: FinishReason | None = None
    ) -> list[NodeEffect]:
        output = SequenceOutput(key_of(attempt), index, token_id, finish)
        return self.tell(StepFinished(StepOutput((output,))))

    def push_done(self, attempt: int = 1) -> list[NodeEffect]:
        return self.tell(PushDone(id_of(attempt), STATS))

    def push_failed(self, attempt: int = 1) -> list[NodeEffect]:
        return self.tell(PushFailed(id_of(attempt), TransferFailed("link lost")))

    def receive_done(self, attempt: int = 1, num_tokens: int = 5) -> list[NodeEffect]:
        return self.tell(ReceiveDone(id_of(attempt), 42, STATS, num_tokens))

    def receive_failed(self, attempt: int = 1) -> list[NodeEffect]:
        return self.tell(ReceiveFailed(id_of(attempt), TransferFailed("link lost")))

    def state(self, attempt: int = 1) -> AttemptState | None:
        return self.core.states().get(id_of(attempt))


STATS = TransferStats(640, 2, 0.5, "memory")


def id_of(attempt: int, epoch: int = EPOCH) -> TransferId:
    return TransferId(epoch, AttemptId(attempt))


def key_of(attempt: int, epoch: int = EPOCH) -> SequenceKey:
    return sequence_key(id_of(attempt, epoch))


@pytest.fixture
def p() -> CoreUnderTest:
    """A prefill node's core, attached to router `EPOCH`."""
    under_test = CoreUnderTest(PrefillNodeCore(NodeCoreConfig(4, b"fingerprint")))
    under_test.connect()
    return under_test


@pytest.fixture
def d() -> CoreUnderTest:
    """A decode node's core, attached to router `EPOCH`."""
    under_test = CoreUnderTest(DecodeNodeCore(NodeCoreConfig(4, b"fingerprint")))
    under_test.connect()
    return under_test


@pytest.fixture(params=[PrefillNodeCore, DecodeNodeCore], ids=["prefill", "decode"])
def node(request: pytest.FixtureRequest) -> CoreUnderTest:
    """A core of either role, attached to router `EPOCH`."""
    under_test = CoreUnderTest(request.param(NodeCoreConfig(4, b"fingerprint")))
    under_test.connect()
    return under_test


@pytest.fixture
def request_of() -> Callable[..., TokenRequest]:
    return make_request


@pytest.fixture
def key() -> SequenceKey:
    """The engine's name of attempt 1."""
    return key_of(1)


@pytest.fixture
def transfer_id() -> TransferId:
    """Attempt 1's transfer."""
    return id_of(1)
