"""A client that reads too slowly is told one end of each request, and never a wrong one."""

from __future__ import annotations

import math
from typing import Any

from kvrelay.core.errors import Overloaded
from kvrelay.core.ids import RequestId
from kvrelay.core.request import FinishReason
from kvrelay.core.request_report import RequestReport
from kvrelay.node.monotonic_clock import MonotonicClock
from kvrelay.router.events import DeliverFinished, DeliverTokens, SessionClosed, Ticked
from kvrelay.router.metrics import RouterMetrics
from kvrelay.router.server_config import RouterConfig
from kvrelay.router.shell import RouterShell

REPORT = RequestReport("p", "d", 1, 3, 5, 0, 0.0, 0.1, 0.2, 0, 0, 0.0, "memory")


class ScriptedCore:
    """Answers a tick with the effects that it was given, and remembers all other events."""

    def __init__(self, effects: list[Any]) -> None:
        self.effects = effects
        self.events: list[Any] = []
        self.look_again_s = math.inf

    def handle(self, event: Any, now_s: float) -> list[Any]:
        if isinstance(event, Ticked):
            return self.effects
        self.events.append(event)
        return []


async def test_a_request_that_was_cut_off_is_not_called_finished_as_well() -> None:
    """Seed 3 of the fault simulation: its last tokens, which did not fit, came together with its end."""
    core = ScriptedCore([])
    config = RouterConfig(max_buffered_tokens_per_session=4)
    shell = RouterShell(config, core, MonotonicClock(), RouterMetrics())  # type: ignore[arg-type]
    session = shell.open_session("slow")
    shell.sessions.add_request(session, 1, RequestId("a"))
    core.effects = [
        DeliverTokens(session.session_id, [1], [5], [1, 2, 3, 4, 5]),
        DeliverFinished(session.session_id, 1, RequestId("a"), FinishReason.LENGTH, REPORT),
    ]
    shell.dispatch(Ticked())
    update = session.outbox.take_now()
    assert update.finished == []
    ((stream_id, error),) = update.failed
    assert stream_id == 1
    assert isinstance(error, Overloaded)
    assert core.events == [SessionClosed(session.session_id)]
    assert session.streams == shell.sessions.session_of == {}
