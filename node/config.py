"""What one node is told when it starts, validated when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.core.node_messages import Role
from kvrelay.engine.config import EngineConfig
from kvrelay.kv_transfer.config import KVTransferConfig

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
MAX_ROUTERS: Final = 64
MAX_NODE_ID_CHARS: Final = 128


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A node of either role.

    `routers` are ``host:port``; the node attaches to all of them. `node_id` empty: drawn from role, host
    and process id. `max_attempts_in_flight` bounds live attempts over all routers. On SIGTERM what is held
    may take `drain_timeout_s` to finish, then it is handed back. A router that cannot be reached is dialled
    again after `reconnect_initial_s`, doubling up to `reconnect_max_s`; heartbeat and lease are the
    router's to say. At most `max_pending_tokens` wait for a router that reads slowly; one that is more than
    `max_buffered_kv_keys` changed KV blocks behind gets all of them anew. `load_interval_s` is how often a
    busy node tells its load at most. A prefix that another node is to send and that has not come within
    `pull_timeout_s` is computed. When the node is attached to its first router it writes `ready_file`, if
    given. `transfer.listen_host` empty: `kvrelay.node.transfer_host` finds one.

    Raises:
        ConfigError: listing every fault.
    """

    role: Role
    engine: EngineConfig
    routers: tuple[str, ...] = ("127.0.0.1:7070",)
    transfer: KVTransferConfig = field(default_factory=KVTransferConfig)
    node_id: str = ""
    max_attempts_in_flight: int = 1024
    drain_timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    reconnect_initial_s: float = 0.1
    reconnect_max_s: float = 1.0
    max_pending_tokens: int = 1 << 18
    max_buffered_kv_keys: int = 1 << 18
    load_interval_s: float = 0.1
    pull_timeout_s: float = 5.0
    ready_file: str = ""
    log_level: str = "info"

    def __post_init__(self) -> None:
        faults = [*self._router_faults(), *self._name_faults(), *self._bound_faults()]
        if faults:
            raise ConfigError("\n".join(faults))

    def _router_faults(self) -> list[str]:
        if not 1 <= len(self.routers) <= MAX_ROUTERS:
            return [f"routers must name from 1 to {MAX_ROUTERS} routers, got {len(self.routers)}"]
        faults = [
            f"routers: {address!r} is not host:port" for address in self.routers if not _is_address(address)
        ]
        if len(set(self.routers)) != len(self.routers):
            faults.append("routers names a router twice")
        return faults

    def _name_faults(self) -> list[str]:
        faults = []
        if len(self.node_id) > MAX_NODE_ID_CHARS or not self.node_id.isprintable():
            faults.append(f"node_id must be at most {MAX_NODE_ID_CHARS} printable characters")
        if self.log_level not in LOG_LEVELS:
            faults.append(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        return faults

    def _bound_faults(self) -> list[str]:
        bounds: dict[str, tuple[float, float]] = {
            "max_attempts_in_flight": (1, 1 << 20),
            "drain_timeout_s": (0, 86400),
            "connect_timeout_s": (0.01, 3600),
            "reconnect_initial_s": (0.001, 3600),
            "reconnect_max_s": (0.001, 3600),
            "max_pending_tokens": (1024, 1 << 30),
            "max_buffered_kv_keys": (1024, 1 << 30),
            "load_interval_s": (0.001, 60),
            "pull_timeout_s": (0.01, 86400),
        }
        faults = [
            f"{name} must be from {low:g} to {high:g}, got {getattr(self, name)}"
            for name, (low, high) in bounds.items()
            if not low <= getattr(self, name) <= high
        ]
        if self.reconnect_initial_s > self.reconnect_max_s:
            faults.append("reconnect_initial_s must not be above reconnect_max_s")
        return faults


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
