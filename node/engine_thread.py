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
from kvrelay.core.kv_events import KVChanges
from kvrelay.engine.interface import Engine, EngineLoad
from kvrelay.node.engine_turns import Deliver, EngineTurns, PushReady
from kvrelay.node.events import EngineCommand, EngineDied, EngineEvent

logger = logging.getLogger(__name__)

STALLED_WAIT_S: Final = 0.005
"""How long to wait for a command when a step computed nothing."""
COMMANDS_PER_ATTEMPT: Final = 5
"""Most of all has a prefill that pulls: reserve, keep, submit, and two releases."""


class _Stop:
    """Ends the thread."""


class EngineThread:
    """Runs an engine's turns. `deliver` is called on the event loop, with what happened, the load where it
    was read, and what has changed in the prefix cache; `push_ready` is called in the engine's thread.

    `prepared` is set once the thread is ready for its first step, or has failed.

    At most ``COMMANDS_PER_ATTEMPT * max_attempts`` commands wait; the node's admission sees to it, so more
    is a bug.
    """

    def __init__(
        self, engine: Engine, clock: Clock, *, deliver: Deliver, push_ready: PushReady, max_attempts: int
    ) -> None:
        self._turns = EngineTurns(engine, clock, post=self._post, push_ready=push_ready)
        self._deliver = deliver
        self._max_commands = COMMANDS_PER_ATTEMPT * max_attempts
        self._commands: SimpleQueue[EngineCommand | _Stop] = SimpleQueue()
        self._clock = clock
        self._busy_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.prepared = asyncio.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve commands; outcomes are delivered on `loop`."""
        self._loop = loop
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
            self._turns.prepare()
            self._call_soon(self.prepared.set)
            while (commands := self._take_commands()) is not None:
                self._busy_since_s = self._clock.now_s()
                self._turns.turn(commands)
                self._busy_since_s = None
        except Exception as error:  # the engine's outermost loop: a fault of the engine itself
            logger.exception("engine failed")
            self._post([EngineDied(f"the engine raised {type(error).__name__}: {error}")], None, None)
            self._call_soon(self.prepared.set)

    def _take_commands(self) -> list[EngineCommand] | None:
        """What waits now; blocks for the first if the engine has nothing to compute. None: told to stop."""
        taken: list[EngineCommand | _Stop] = []
        if not self._turns.has_work():
            taken.append(self._commands.get())
        elif self._turns.is_stalled:
            with suppress(Empty):
                taken.append(self._commands.get(timeout=STALLED_WAIT_S))
        while not self._commands.empty():
            taken.append(self._commands.get_nowait())
        commands = [command for command in taken if not isinstance(command, _Stop)]
        return commands if len(commands) == len(taken) else None

    def _post(
        self, events: Sequence[EngineEvent], load: EngineLoad | None, kv_changes: KVChanges | None
    ) -> None:
        self._call_soon(self._deliver, events, load, kv_changes)

    def _call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has closed: the process could not wait for this step
            self._loop.call_soon_threadsafe(function, *arguments)
