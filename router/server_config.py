"""What a router process is configured with: where it listens, its bounds, and its core's limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.router.config import RouterCoreConfig

MAX_PORT: Final = 65535
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Every bound of the router's shell. Port 0 takes a free one; the ready file says which.

    `router_id` empty: host name and gRPC port. A session whose client reads so slowly that
    `max_buffered_tokens_per_session` tokens wait for it loses its live requests. On SIGTERM, requests get
    `drain_timeout_s` to finish. A session stops being read while it has `max_buffered_answers_per_session`
    unsent answers to its calls. For `attach_wait_s` after its start a router calls no model unknown: nodes
    may be about to attach, so it has clients ask another router, or come again.

    Raises:
        ConfigError: with all faults, one a line.
    """

    listen_host: str = "0.0.0.0"
    grpc_port: int = 7070
    http_port: int = 7071
    router_id: str = ""
    ready_file: str = ""
    log_level: str = "info"
    core: RouterCoreConfig = field(default_factory=RouterCoreConfig)
    max_sessions: int = 4096
    max_streams_per_session: int = 16_384
    max_buffered_tokens_per_session: int = 262_144
    max_buffered_answers_per_session: int = 4096
    max_nodes: int = 4096
    max_buffered_commands_per_node: int = 16_384
    max_watchers: int = 64
    max_tokenizers: int = 8
    hello_timeout_s: float = 10.0
    tokenizer_wait_s: float = 10.0
    attach_wait_s: float = 2.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        faults = []
        if not self.listen_host:
            faults.append("listen_host must not be empty")
        faults += [
            f"{name} must be a port from 0 to {MAX_PORT}, got {getattr(self, name)!r}"
            for name in ("grpc_port", "http_port")
            if not _is_whole(getattr(self, name), 0, MAX_PORT)
        ]
        if self.grpc_port == self.http_port != 0:
            faults.append(f"grpc_port and http_port must differ, both are {self.grpc_port}")
        if self.log_level.lower() not in LOG_LEVELS:
            faults.append(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        if len(self.router_id) > 128 or not self.router_id.isprintable():
            faults.append("router_id must be at most 128 printable characters")
        faults += self._bound_faults()
        if faults:
            raise ConfigError("\n".join(faults))

    def _bound_faults(self) -> list[str]:
        faults = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name.startswith("max_") and not _is_whole(value, 1, 2**31 - 1):
                faults.append(f"{spec.name} must be an integer of at least 1, got {value!r}")
            if spec.name.endswith("_s") and not _is_seconds(value):
                faults.append(f"{spec.name} must be a number of seconds of at least 0, got {value!r}")
        return faults


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_seconds(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0  # type: ignore[operator,arg-type]  # is_number
