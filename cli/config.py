"""What `kvrelay up` starts: the `[cluster]` section, validated when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvrelay.core.errors import ConfigError

MAX_NODES_PER_ROLE: Final = 256


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A cluster on this machine: one router, and `prefill` and `decode` nodes of these roles. What each of
    them is told stands in its own section.

    A cluster that is not ready after `start_timeout_s` is given up; a service that is not gone
    `stop_timeout_s` after it was asked to stop is killed. `log_dir` empty: a new temporary folder. `proxy`:
    an OpenAI proxy stands in front of it.

    Raises:
        ConfigError: listing every fault.
    """

    prefill: int = 1
    decode: int = 1
    start_timeout_s: float = 600.0
    stop_timeout_s: float = 40.0
    log_dir: str = ""
    proxy: bool = True

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "prefill": (1, MAX_NODES_PER_ROLE),
            "decode": (1, MAX_NODES_PER_ROLE),
            "start_timeout_s": (0.1, 86400),
            "stop_timeout_s": (0.1, 86400),
        }
        faults = [
            f"{name} must be from {low:g} to {high:g}, got {getattr(self, name)!r}"
            for name, (low, high) in bounds.items()
            if not low <= getattr(self, name) <= high
        ]
        if faults:
            raise ConfigError("\n".join(faults))
