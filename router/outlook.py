"""What is foretold of a request while it waits and when it is placed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks of the nodes: seconds of prefill, tokens of output, KV room in tokens. What is at
    best or least leaves out what forecasts have been wrong by."""

    prefill_s: float = 0.0
    prefill_at_best_s: float = 0.0
    num_output_tokens: float = 1.0
    least_output_tokens: float = 1.0
    num_room_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """Times on the core's clock. In a queue the request takes part with `work_s` seconds of nodes, and should
    start by `due_s`; it is given up at `hopeless_s`, when it would be too late even at best. When it came it
    was expected to wait `wait_s`, if it had to, and then to decode with `step_s` a token; when it was placed,
    to end `total_s` after it had come. `is_trial`: it would have been refused, and is served to find out
    whether that would have been right."""

    demand: Demand = Demand()
    work_s: float = 0.0
    due_s: float = math.inf
    hopeless_s: float = math.inf
    ttft_deadline_s: float = math.inf
    wait_s: float = 0.0
    step_s: float = 0.0
    total_s: float | None = None
    has_waited: bool = False
    is_trial: bool = False


UNKNOWN_OUTLOOK: Final = Outlook()
