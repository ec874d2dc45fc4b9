"""A simulated node's engine thread: real turns of the real `sim` engine, whose steps take virtual time."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.core.ids import TransferId
from kvrelay.core.kv_events import KVChanges
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.interface import EngineLoad, KVReady
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.node.engine_thread import STALLED_WAIT_S
from kvrelay.node.engine_turns import Deliver, EngineTurns, PushReady
from kvrelay.node.events import EngineCommand, EngineEvent
from kvrelay.simulator.faults.process import Lane, Process, Timer


class EngineWorker:
    """What a step computes is there when it begins; what it says comes when it would have been computed.

    `slowness`: how many times as long a step takes as its timing says.
    """

    def __init__(
        self, process: Process, config: EngineConfig, *, deliver: Deliver, push_ready: PushReady
    ) -> None:
        self._process = process
        self._deliver = deliver
        self._push_ready = push_ready
        self._commands: list[EngineCommand] = []
        self._busy_s = 0.0
        self._is_busy = False
        self._to_loop = Lane(process)
        self._to_transfer = Lane(process, max_delay_s=0.0)  # posted within the step, before what it says
        self._turn_timer = Timer(process, self._turn)
        self.slowness = 1.0
        self.has_changed = True
        """Whether the engine has done anything since this was set to False."""
        self.engine = SimEngine(config, sleep=self._sleep, read_clock=self.now_s)
        self._turns = EngineTurns(self.engine, self, post=self._post, push_ready=self._post_ready)
        self._turns.prepare()

    def now_s(self) -> float:
        """The engine thread's own time: that of the process, and what the step has taken so far."""
        return self._process.now_s() + self._busy_s

    def send(self, command: EngineCommand) -> None:
        """Queue a command."""
        self._commands.append(command)
        if not self._is_busy:
            self._turn_timer.set_sooner(0.0001)

    def _turn(self) -> None:
        if not self._commands and not self._turns.has_work():
            return
        self.has_changed = True
        commands, self._commands = self._commands, []
        self._turns.turn(commands)
        taken_s, self._busy_s = self._busy_s, 0.0
        if taken_s == 0.0 and self._turns.is_stalled:
            taken_s = STALLED_WAIT_S
        self._is_busy = True
        self._process.after(taken_s, self._on_idle)

    def _on_idle(self) -> None:
        self._is_busy = False
        if self._commands or self._turns.has_work():
            self._turn_timer.set(0.0)

    def _sleep(self, seconds: float) -> None:
        self._busy_s += seconds * self.slowness

    def _post(
        self, events: Sequence[EngineEvent], load: EngineLoad | None, kv_changes: KVChanges | None
    ) -> None:
        kept = list(events)
        self._to_loop.post(lambda: self._deliver(kept, load, kv_changes), self.now_s())

    def _post_ready(self, transfer_id: TransferId, ready: KVReady) -> None:
        table = tuple(ready.block_table)
        kept = KVReady(ready.key, table, ready.layers, ready.tokens)
        self._to_transfer.post(lambda: self._push_ready(transfer_id, kept), self.now_s())
