"""The one thread that owns the engine: commands in, steps computed, outcomes posted to the event loop.

It blocks on its queue while the engine has nothing to do. The outcomes of commands are posted before the
engine's next turn, those of a step right after it: never one call a token. A long step takes several turns,
and commands are served between them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from kvrelay.core.clock import Clock
from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import TransferId
from kvrelay.core.kv_events import KVChanges
from kvrelay.engine.interface import Engine, EngineLoad, KVReady, SequenceKey
from kvrelay.node.events import (
    EngineCommand,
    EngineDied,
    EngineEvent,
    PrefillStarted,
    ReleaseSequence,
    ReserveSequence,
    SequenceRefused,
    SequenceReleased,
    SequenceReserved,
    StartDecode,
    StepFinished,
    SubmitPrefill,
)

logger = logging.getLogger(__name__)

LOAD_INTERVAL_S: Final = 0.05
"""A busy engine's load is read no more often than this."""
STALLED_WAIT_S: Final = 0.005
"""How long to wait for a command when a step computed nothing."""
COMMANDS_PER_ATTEMPT: Final = 3

PushReady = Callable[[TransferId, KVReady], None]
Deliver = Callable[[Sequence[EngineEvent], EngineLoad | None, KVChanges | None], None]


class _Stop:
    """Ends the thread."""


class EngineThread:
    """Runs an engine. `deliver` is called on the event loop, with what happened, the load where it was read,
    and what has changed in the prefix cache; `push_ready` is called in the engine's thread.

    `prepared` is set once the thread is ready for its first step, or has failed.

    At most ``COMMANDS_PER_ATTEMPT * max_attempts`` commands wait; the node's admission sees to it, so more
    is a bug.
    """

    def __init__(
        self, engine: Engine, clock: Clock, *, deliver: Deliver, push_ready: PushReady, max_attempts: int
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._deliver = deliver
        self._push_ready = push_ready
        self._max_commands = COMMANDS_PER_ATTEMPT * max_attempts
        self._commands: SimpleQueue[EngineCommand | _Stop] = SimpleQueue()
        self._transfer_ids: dict[SequenceKey, TransferId] = {}
        self._load_read_s = float("-inf")
        self._is_stalled = False
        self._busy_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.prepared = asyncio.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve commands; outcomes are delivered on `loop`."""
        self._loop = loop
        self._engine.set_kv_ready_listener(self._on_kv_ready)
        self._thread.start()

    def send(self, command: EngineCommand) -> None:
        """Queue a command; never blocks."""
        assert self._commands.qsize() < self._max_commands, "the engine's command queue is full"
        self._commands.put(command)

    def stop(self, timeout_s: float) -> bool:
        """End after the part of a step that runs now. Blocks up to `timeout_s`; False: it still runs then."""
        if self._thread.is_alive():
            self._commands.put(_Stop())
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stuck_for_s(self) -> float:
        """How long the turn under way has taken, from any thread; 0 while the engine waits for commands."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else max(0.0, self._clock.now_s() - since_s)

    # ---- in the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._engine.prepare_thread()
            if (held := self._engine.take_kv_changes()) is not None:  # from now on changes are noted
                self._post([], None, held)
            self._call_soon(self.prepared.set)
            while self._turn():
                pass
        except Exception as error:  # the engine's outermost loop: a fault of the engine itself
            logger.exception("engine failed")
            self._post([EngineDied(f"the engine raised {type(error).__name__}: {error}")], None, None)
            self._call_soon(self.prepared.set)

    def _turn(self) -> bool:
        """Take the commands that wait, compute a step or a part of it; False when told to stop."""
        events: list[EngineEvent] = []
        self._busy_since_s = None
        commands = self._take_commands()
        self._busy_since_s = self._clock.now_s()
        for command in commands:
            if isinstance(command, _Stop):
                return False
            self._apply(command, events)
        has_work = self._engine.has_work()
        if events or not has_work:
            self._post(events, self._read_load(is_idle=not has_work), self._engine.take_kv_changes())
        if has_work:
            self._step()
        return True

    def _take_commands(self) -> list[EngineCommand | _Stop]:
        """What waits now; blocks for the first if the engine has nothing to compute."""
        taken: list[EngineCommand | _Stop] = []
        if not self._engine.has_work():
            taken.append(self._commands.get())
        elif self._is_stalled:
            with suppress(Empty):
                taken.append(self._commands.get(timeout=STALLED_WAIT_S))
        while not self._commands.empty():
            taken.append(self._commands.get_nowait())
        return taken

    def _step(self) -> None:
        began_s = self._clock.now_s()
        step = self._engine.step()
        num_computed = step.num_prefill_tokens + step.num_decode_tokens
        self._is_stalled = not (step.outputs or step.failures or num_computed or step.is_partial)
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

    def _post(self, events: list[EngineEvent], load: EngineLoad | None, kv_changes: KVChanges | None) -> None:
        self._call_soon(self._deliver, events, load, kv_changes)

    def _call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has closed: the process could not wait for this step
            self._loop.call_soon_threadsafe(function, *arguments)

    def _apply(self, command: EngineCommand, events: list[EngineEvent]) -> None:
        match command:
            case ReleaseSequence(key):
                self._engine.release(key)
                self._transfer_ids.pop(key, None)
                events.append(SequenceReleased(key))
            case StartDecode(key, first_token_id):
                self._engine.start_decode(key, first_token_id)
            case ReserveSequence() | SubmitPrefill():
                self._admit(command, events)

    def _admit(self, command: ReserveSequence | SubmitPrefill, events: list[EngineEvent]) -> None:
        key = command.key
        try:
            if isinstance(command, ReserveSequence):
                events.append(SequenceReserved(self._engine.reserve(command.request, key)))
            else:
                self._transfer_ids[key] = command.transfer_id
                self._engine.submit_prefill(command.request, key)
        except KVRelayError as error:
            self._transfer_ids.pop(key, None)
            events.append(SequenceRefused(key, error))

    def _on_kv_ready(self, ready: KVReady) -> None:
        transfer_id = self._transfer_ids.get(ready.key)
        if transfer_id is not None:
            self._push_ready(transfer_id, ready)
