"""Random orders of everything that can happen to a node: exactly one terminal report, nothing held after it.

The world around the core is modelled: an engine that answers its commands in order but late, transfers
whose outcome may be on its way while they are being cancelled, routers that come and go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.core.errors import Overloaded, TransferFailed
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    KVReleased,
    PrefillFinished,
    PullOrder,
    ReleaseKV,
    Report,
    ReserveDecode,
    Role,
    SendPrefix,
    StartPrefill,
    StopPull,
    Welcome,
)
from kvrelay.core.request import FinishReason, Prefix, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.decode_node.core import DecodeNodeCore
from kvrelay.engine.interface import Reservation, SequenceFailure, SequenceKey, SequenceOutput, StepOutput
from kvrelay.kv_transfer.interface import (
    PushDone,
    PushFailed,
    ReceiveDone,
    ReceiveFailed,
    TransferEvent,
    TransferStats,
)
from kvrelay.node.attempt import sequence_key
from kvrelay.node.core import NodeCore, NodeCoreConfig
from kvrelay.node.events import (
    CancelTransfer,
    CloseRouter,
    DrainRequested,
    DrainTimedOut,
    ExpectTransfer,
    FinishPush,
    KeepPrefix,
    NodeEffect,
    NodeEvent,
    OpenPush,
    PinPrefix,
    PrefixHeld,
    PrefixKept,
    PushPrefix,
    RefuseTransfer,
    ReleaseSequence,
    ReservePrefix,
    ReserveSequence,
    RouterConnected,
    RouterFrameReceived,
    RouterStreamLost,
    SendFrame,
    SequenceRefused,
    SequenceReleased,
    SequenceReserved,
    StartDecode,
    StepFinished,
    SubmitPrefill,
    Ticked,
    TransferCancelled,
)
from kvrelay.prefill_node.core import PrefillNodeCore
from kvrelay.prefill_node.pulling_core import PullingNodeCore

EPOCHS = (1, 2)
LEASE_S = 3.0
STATS = TransferStats(1, 1, 0.1, "model")
REQUEST = TokenRequest((1, 2, 3), 3, SamplingParams())
ANY = st.randoms(use_true_random=False)


class NodeWorld(RuleBasedStateMachine):
    """Around one core."""

    make_core: Callable[[NodeCoreConfig], NodeCore]

    def __init__(self) -> None:
        super().__init__()
        self.core = type(self).make_core(NodeCoreConfig(6))
        self.now_s = 0.0
        self.connected: set[int] = set()
        self.next_attempt = 1
        self.engine_queue: deque[NodeEffect] = deque()
        self.held: dict[SequenceKey, TransferId] = {}
        self.running: dict[SequenceKey, int] = {}
        self.open: set[TransferId] = set()
        self.finishing: set[TransferId] = set()
        self.receiving: set[TransferId] = set()
        self.cancelling: list[TransferId] = []
        self.on_the_way: deque[TransferEvent] = deque()
        self.asked: dict[TransferId, int] = {}
        self.answers: dict[TransferId, list[Report]] = {}
        self.lost_with_stream: set[TransferId] = set()
        self.pulls: set[TransferId] = set()
        self._connect(EPOCHS[0])

    # ---- the core, and what its effects do to the world ------------------------------------------

    def tell(self, event: NodeEvent) -> None:
        for effect in self.core.handle(event, self.now_s):
            self._perform(effect)

    def _perform(self, effect: NodeEffect) -> None:
        match effect:
            case SendFrame(epoch, _, reports):
                for report in reports:
                    self._hear(epoch, report)
            case CloseRouter(epoch, _):
                self._lose(epoch)
            case OpenPush(spec):
                self.open.add(spec.transfer_id)
            case ExpectTransfer(expected):
                self.open.add(expected.transfer_id)
                self.receiving.add(expected.transfer_id)
                self.finishing.add(expected.transfer_id)
            case RefuseTransfer(transfer_id):
                assert transfer_id not in self.receiving, "refused what was expected"
            case PushPrefix(transfer_id):
                assert transfer_id in self.open
                self.finishing.add(transfer_id)
            case FinishPush(transfer_id, _):
                self.finishing.add(transfer_id)
            case CancelTransfer(transfer_id):
                self.cancelling.append(transfer_id)
            case _:
                self.engine_queue.append(effect)

    def _hear(self, epoch: int, report: Report) -> None:
        assert epoch in self.connected, "told a router that is not connected"
        if isinstance(report, (AttemptRefused, AttemptFinished, AttemptFailed, KVReleased)):
            transfer_id = TransferId(epoch, report.attempt)
            self.answers.setdefault(transfer_id, []).append(report)
            assert transfer_id not in self.open, f"{report} while its transfer is open"
            assert transfer_id not in self.held.values(), f"{report} while the engine holds it"
        elif isinstance(report, PrefillFinished):
            assert TransferId(epoch, report.attempt) in self.held.values()

    def _connect(self, epoch: int) -> None:
        self.connected.add(epoch)
        self.tell(RouterConnected(Welcome("r", epoch, 1.0, LEASE_S)))

    def _lose(self, epoch: int) -> None:
        self.connected.discard(epoch)
        self.lost_with_stream |= {id_ for id_ in self.asked if id_.router_epoch == epoch}
        self.tell(RouterStreamLost(epoch))

    # ---- routers -----------------------------------------------------------------------------------

    @precondition(lambda self: self.connected)
    @rule(random=ANY)
    def start_attempt(self, random: Random) -> None:
        epoch = random.choice(sorted(self.connected))
        attempt = AttemptId(self.next_attempt)
        self.next_attempt += 1
        self.asked[TransferId(epoch, attempt)] = 1
        if random.random() < 0.3:
            self.tell(RouterFrameReceived(epoch, (SendPrefix(attempt, Prefix((1, 2, 3)), "p:1"),)))
        elif self.core.role is Role.PREFILL:
            pull = self._order_pull(epoch) if random.random() < 0.6 else None
            self.tell(RouterFrameReceived(epoch, (StartPrefill(attempt, REQUEST, "d:1", pull),)))
        else:
            self.tell(RouterFrameReceived(epoch, (ReserveDecode(attempt, REQUEST),)))

    def _order_pull(self, epoch: int) -> PullOrder:
        number = AttemptId(self.next_attempt)
        self.next_attempt += 1
        self.pulls.add(TransferId(epoch, number))
        return PullOrder(number, 2)

    @precondition(lambda self: any(id_.router_epoch in self.connected for id_ in self.asked))
    @rule(random=ANY)
    def stop_a_pull(self, random: Random) -> None:
        asked = random.choice(sorted(id_ for id_ in self.asked if id_.router_epoch in self.connected))
        self.tell(RouterFrameReceived(asked.router_epoch, (StopPull(asked.attempt),)))

    @precondition(lambda self: any(id_.router_epoch in self.connected for id_ in self.asked))
    @rule(random=ANY)
    def ask_for_release(self, random: Random) -> None:
        asked = random.choice(sorted(id_ for id_ in self.asked if id_.router_epoch in self.connected))
        if asked in self.core.states():
            self.lost_with_stream.discard(asked)
        else:
            self.asked[asked] += 1  # answered once more: nothing is held
        self.tell(RouterFrameReceived(asked.router_epoch, (ReleaseKV(asked.attempt),)))

    @rule(epoch=st.sampled_from(EPOCHS))
    def connect_or_lose(self, epoch: int) -> None:
        if epoch in self.connected:
            self._lose(epoch)
        else:
            self._connect(epoch)

    @rule(seconds=st.floats(0.1, 2.0))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.tell(Ticked())

    @rule()
    def hear_heartbeats(self) -> None:
        for epoch in sorted(self.connected):
            self.tell(RouterFrameReceived(epoch))

    @rule(which=st.integers(0, 9))
    def drain(self, which: int) -> None:
        if which == 0:
            self.tell(DrainRequested())
        elif which == 1:
            self.tell(DrainTimedOut())

    # ---- the engine --------------------------------------------------------------------------------

    @precondition(lambda self: self.engine_queue)
    @rule(refuses=st.integers(0, 4).map(lambda number: number == 0), is_cached=st.booleans())
    def engine_takes_a_command(self, refuses: bool, is_cached: bool = False) -> None:
        match self.engine_queue.popleft():
            case ReserveSequence(key) | SubmitPrefill(key) | PinPrefix(key) | ReservePrefix(key) if refuses:
                self.tell(SequenceRefused(key, Overloaded("full")))
            case ReserveSequence(key):
                self.held[key] = self._id_of(key)
                self.tell(SequenceReserved(Reservation(key, (BlockId(0),), 0)))
            case SubmitPrefill(key):
                self.held[key] = self._id_of(key)
                self.running[key] = 0
            case PinPrefix(key, prefix) | ReservePrefix(key, prefix):
                self.held[key] = self._id_of(key)
                num_cached_tokens = len(prefix.token_ids) if is_cached else 0
                self.tell(PrefixHeld(Reservation(key, (BlockId(0),), num_cached_tokens)))
            case KeepPrefix(key, num_tokens):
                assert self._id_of(key) not in self.open, "kept while its transfer is open"
                self.held.pop(key)
                self.tell(PrefixKept(key, num_tokens))
            case StartDecode(key):
                if key in self.held:
                    self.running[key] = 1
            case ReleaseSequence(key):
                assert self._id_of(key) not in self.open, "freed while its transfer is open"
                self.held.pop(key, None)
                self.running.pop(key, None)
                self.tell(SequenceReleased(key))

    def _id_of(self, key: SequenceKey) -> TransferId:
        return next(id_ for id_ in [*self.asked, *self.pulls] if str(id_) == key)

    @precondition(lambda self: self.running)
    @rule(outcome=st.sampled_from(["token", "token", "token", "last", "failure"]), random=ANY)
    def engine_steps(self, outcome: str, random: Random) -> None:
        key = random.choice(sorted(self.running))
        index = self.running[key]
        if outcome == "failure":
            self.running.pop(key)
            self.held.pop(key)
            self.tell(StepFinished(StepOutput(failures=(SequenceFailure(key, "gave up"),))))
            return
        self.running[key] += 1
        finish = FinishReason.STOP if outcome == "last" else None
        if self.core.role is Role.PREFILL:
            self.running.pop(key)  # its KV stays held
        elif finish is not None:
            self.running.pop(key)
            self.held.pop(key)
        self.tell(StepFinished(StepOutput((SequenceOutput(key, index, 5, finish),))))

    # ---- transfers ---------------------------------------------------------------------------------

    @precondition(lambda self: self.open)
    @rule(fails=st.booleans(), random=ANY)
    def transfer_ends(self, fails: bool, random: Random) -> None:
        transfer_id = random.choice(sorted(self.open))
        fails = fails or transfer_id not in self.finishing
        self.open.discard(transfer_id)
        error = TransferFailed("lost")
        event: TransferEvent
        if transfer_id in self.receiving:
            event = ReceiveFailed(transfer_id, error) if fails else ReceiveDone(transfer_id, 5, STATS, 2)
        else:
            event = PushFailed(transfer_id, error) if fails else PushDone(transfer_id, STATS)
        self.on_the_way.append(event)

    @precondition(lambda self: self.on_the_way)
    @rule()
    def transfer_event_arrives(self) -> None:
        self.tell(self.on_the_way.popleft())

    @precondition(lambda self: self.cancelling)
    @rule(random=ANY)
    def cancel_completes(self, random: Random) -> None:
        transfer_id = self.cancelling.pop(random.randrange(len(self.cancelling)))
        self.open.discard(transfer_id)
        self.tell(TransferCancelled(transfer_id))

    # ---- what must hold ----------------------------------------------------------------------------

    @invariant()
    def no_attempt_is_answered_twice(self) -> None:
        for transfer_id, reports in self.answers.items():
            assert len(reports) <= self.asked[transfer_id], f"{transfer_id}: {reports}"

    @invariant()
    def the_node_knows_what_it_holds(self) -> None:
        live = self.core.states()
        for transfer_id in self.held.values():
            is_known = self._is_pull_known(transfer_id) or transfer_id in live
            assert is_known, f"{transfer_id} is held by the engine, the node has forgotten it"
        for transfer_id in self.open:
            is_known = self._is_pull_known(transfer_id) or transfer_id in live
            assert is_known, f"{transfer_id} is open, the node has forgotten it"

    def _is_pull_known(self, transfer_id: TransferId) -> bool:
        """The node has that pull in mind, or has told the engine to free it."""
        if not isinstance(self.core, PullingNodeCore):
            return False
        key = sequence_key(transfer_id)
        is_told = any(isinstance(item, ReleaseSequence) and item.key == key for item in self.engine_queue)
        return is_told or key in self.core._pulls

    def teardown(self) -> None:
        for transfer_id, state in self.core.states().items():
            if transfer_id.router_epoch in self.connected and state is not None:
                self.tell(RouterFrameReceived(transfer_id.router_epoch, (ReleaseKV(transfer_id.attempt),)))
                self.lost_with_stream.discard(transfer_id)
        self.now_s += LEASE_S + 1
        for epoch in self.connected:
            self.tell(RouterFrameReceived(epoch))
        self.tell(Ticked())
        while self.engine_queue or self.on_the_way or self.cancelling:
            if self.on_the_way:
                self.transfer_event_arrives()
            elif self.cancelling:
                transfer_id = self.cancelling.pop()
                self.open.discard(transfer_id)
                self.tell(TransferCancelled(transfer_id))
            else:
                self.engine_takes_a_command(False)
        assert self.core.num_attempts == self.core.num_open_transfers == 0
        assert not self.held
        assert not self.open
        for transfer_id, times in self.asked.items():
            answers = self.answers.get(transfer_id, [])
            if transfer_id not in self.lost_with_stream:
                assert len(answers) == times, f"{transfer_id}: asked {times} times, answered {answers}"


class PrefillWorld(NodeWorld):
    make_core = PrefillNodeCore


class DecodeWorld(NodeWorld):
    make_core = DecodeNodeCore


SETTINGS = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPrefillWorld = PrefillWorld.TestCase
TestPrefillWorld.settings = SETTINGS
TestDecodeWorld = DecodeWorld.TestCase
TestDecodeWorld.settings = SETTINGS
