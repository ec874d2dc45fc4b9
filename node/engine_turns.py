"""What an engine's owner does, turn by turn: serve commands, compute a step, tell what came of it.

No thread, queue or event loop: `EngineThread` runs it on a thread, the fault simulation on a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from kvrelay.core.clock import Clock
from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import TransferId
from kvrelay.core.kv_events import KVChanges
from kvrelay.engine.interface import Engine, EngineLoad, KVReady, SequenceKey
from kvrelay.node.events import (
    EngineCommand,
    EngineEvent,
    KeepPrefix,
    PinPrefix,
    PrefillStarted,
    PrefixHeld,
    PrefixKept,
    ReleaseSequence,
    ReservePrefix,
    ReserveSequence,
    SequenceRefused,
    SequenceReleased,
    SequenceReserved,
    StartDecode,
    StepFinished,
    SubmitPrefill,
)

LOAD_INTERVAL_S: Final = 0.05
"""A busy engine's load is read no more often than this."""

PushReady = Callable[[TransferId, KVReady], None]
Deliver = Callable[[Sequence[EngineEvent], EngineLoad | None, KVChanges | None], None]


class EngineTurns:
    """Owns an engine. `post` gets what happened, the load where it was read, and what has changed in the
    prefix cache; `push_ready` gets KV that may be sent, in the middle of a step."""

    def __init__(self, engine: Engine, clock: Clock, *, post: Deliver, push_ready: PushReady) -> None:
        self._engine = engine
        self._clock = clock
        self._post = post
        self._push_ready = push_ready
        self._transfer_ids: dict[SequenceKey, TransferId] = {}
        self._load_read_s = float("-inf")
        self.is_stalled = False
        """Whether the last step computed nothing though there is work: only a command can change that."""

    def prepare(self) -> None:
        """Called once in the thread of all turns, before the first."""
        self._engine.set_kv_ready_listener(self._on_kv_ready)
        self._engine.prepare_thread()
        if (held := self._engine.take_kv_changes()) is not None:  # from now on changes are noted
            self._post([], None, held)

    def has_work(self) -> bool:
        """Whether a turn without commands would compute something."""
        return self._engine.has_work()

    def turn(self, commands: Sequence[EngineCommand]) -> None:
        """Serve the commands, in order, then compute a step or a part of it."""
        events: list[EngineEvent] = []
        for command in commands:
            self._apply(command, events)
        has_work = self._engine.has_work()
        if events or not has_work:
            self._post(events, self._read_load(is_idle=not has_work), self._engine.take_kv_changes())
        if has_work:
            self._step()

    def _step(self) -> None:
        began_s = self._clock.now_s()
        step = self._engine.step()
        num_computed = step.num_prefill_tokens + step.num_decode_tokens
        self.is_stalled = not (step.outputs or step.failures or num_computed or step.is_partial)
        events: list[EngineEvent] = [
            PrefillStarted(started.key, began_s, started.num_cached_tokens) for started in step.started
        ]
        if step.outputs or step.failures:
            events.append(StepFinished(step))
        load = self._read_load(is_idle=not self._engine.has_work())
        kv_changes = self._engine.take_kv_changes()
        if events or load is not None or kv_changes is not None:
            self._post(events, load, kv_changes)

    def _read_load(self, *, is_idle: bool) -> EngineLoad | None:
        now_s = self._clock.now_s()
        if not is_idle and now_s - self._load_read_s < LOAD_INTERVAL_S:
            return None
        self._load_read_s = now_s
        return self._engine.load()

    def _apply(self, command: EngineCommand, events: list[EngineEvent]) -> None:
        match command:
            case ReleaseSequence(key):
                self._engine.release(key)
                self._transfer_ids.pop(key, None)
                events.append(SequenceReleased(key))
            case StartDecode(key, first_token_id):
                self._engine.start_decode(key, first_token_id)
            case KeepPrefix(key, num_tokens):
                events.append(PrefixKept(key, self._engine.keep_prefix(key, num_tokens)))
            case _:
                try:
                    self._admit(command, events)
                except KVRelayError as error:
                    self._transfer_ids.pop(command.key, None)
                    events.append(SequenceRefused(command.key, error))

    def _admit(
        self, command: ReserveSequence | SubmitPrefill | PinPrefix | ReservePrefix, events: list[EngineEvent]
    ) -> None:
        match command:
            case ReserveSequence(key, request):
                events.append(SequenceReserved(self._engine.reserve(request, key)))
            case SubmitPrefill(key, request, transfer_id):
                self._transfer_ids[key] = transfer_id
                self._engine.submit_prefill(request, key)
            case PinPrefix(key, prefix):
                events.append(PrefixHeld(self._engine.pin_prefix(prefix, key)))
            case ReservePrefix(key, prefix):
                events.append(PrefixHeld(self._engine.reserve_prefix(prefix, key)))

    def _on_kv_ready(self, ready: KVReady) -> None:
        transfer_id = self._transfer_ids.get(ready.key)
        if transfer_id is not None:
            self._push_ready(transfer_id, ready)
