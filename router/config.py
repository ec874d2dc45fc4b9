"""The core's limits and times, validated when built. Cores receive values; files are parsed at the edge."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final, Literal, get_args

from kvrelay.core.errors import ConfigError

Placement = Literal["kvrelay", "least-loaded", "round-robin"]
PLACEMENTS: Final[tuple[Placement, ...]] = get_args(Placement)


@dataclass(frozen=True, slots=True)
class RouterCoreConfig:
    """Every bound of the router's core. Times in seconds on the core's clock.

    `placement`: ``kvrelay`` places by predicted times and by what nodes hold; the others, which know less,
    are there to compare it with.

    Queue: `max_queued_requests` over all models; a request waits at most `queue_timeout_s` for room, and at
    most `node_wait_s` while no pair of nodes could serve its model at all.

    Attempts: `max_attempts` counts dispatches of one request that a node accepted; refusals are bounded by
    the queue time-out. The first continuation starts at once; each later one waits, first `retry_pause_s`,
    then four times as long each time, so that a node which is dead and not yet known to be lost can't use
    up all attempts. A node that refused gets nothing for `refusal_pause_s`, then until its next load
    report, but not longer than `max_refusal_pause_s`.

    Accounting: a prefill node has at most `max_prefill_requests_per_node` unsettled attempts and
    `max_prefill_tokens_per_node` tokens not yet computed (one longer prompt is allowed alone); a decode node
    sets blocks aside for each prompt plus `growth_tokens` of output.

    Holds: an acknowledgement later than `ack_timeout_s` is counted as overdue; `lease_s` after the release
    was sent, the node is taken to hold nothing. `heartbeat_s`, `lease_s` go into `Welcome`, and a stream
    silent for `node_silence_s` is the shell's to report as lost.

    Block index: at most `max_index_entries` pairs of block and node, about 100 bytes each, and
    `max_indexed_nodes` nodes. A snapshot of a node's blocks that has not begun `kv_snapshot_retry_s` after it
    was asked for is asked for again; a node that says nothing of its blocks for `node_silence_s` is stale.

    Raises:
        ConfigError: with all faults, one a line.
    """

    placement: Placement = "kvrelay"
    max_queued_requests: int = 1024
    queue_timeout_s: float = 30.0
    node_wait_s: float = 10.0
    default_deadline_s: float = 600.0
    max_deadline_s: float = 3600.0
    max_attempts: int = 5
    retry_pause_s: float = 0.3
    max_retry_pause_s: float = 5.0
    refusal_pause_s: float = 0.02
    max_refusal_pause_s: float = 1.0
    max_prefill_requests_per_node: int = 64
    max_prefill_tokens_per_node: int = 32768
    growth_tokens: int = 256
    max_early_tokens: int = 1024
    """Tokens of one decode attempt kept while the prefill node's first token is still on its way."""
    ack_timeout_s: float = 5.0
    lease_s: float = 10.0
    heartbeat_s: float = 1.0
    node_silence_s: float = 5.0
    min_retry_after_s: float = 0.5
    max_retry_after_s: float = 30.0
    num_remembered_decisions: int = 128
    max_index_entries: int = 10_000_000
    max_indexed_nodes: int = 1024
    kv_snapshot_retry_s: float = 2.0

    def __post_init__(self) -> None:
        faults = [*self._value_faults(), *self._order_faults()]
        if faults:
            raise ConfigError("\n".join(faults))

    def _value_faults(self) -> list[str]:
        faults = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name == "placement":
                if value not in PLACEMENTS:
                    faults.append(f"placement must be one of {', '.join(PLACEMENTS)}, got {value!r}")
            elif spec.type == "int":
                low = 0 if spec.name in ("growth_tokens", "num_remembered_decisions") else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < low:
                    faults.append(f"{spec.name} must be an integer of at least {low}, got {value!r}")
            elif (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
                or value <= 0
            ):
                faults.append(f"{spec.name} must be a number of seconds above 0, got {value!r}")
        return faults

    def _order_faults(self) -> list[str]:
        ordered = (
            ("default_deadline_s", "max_deadline_s"),
            ("retry_pause_s", "max_retry_pause_s"),
            ("refusal_pause_s", "max_refusal_pause_s"),
            ("ack_timeout_s", "lease_s"),
            ("heartbeat_s", "node_silence_s"),
            ("min_retry_after_s", "max_retry_after_s"),
        )
        faults = []
        for smaller, larger in ordered:
            low, high = getattr(self, smaller), getattr(self, larger)
            if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
                faults.append(f"{smaller} ({low:g}) must not be above {larger} ({high:g})")
        return faults
