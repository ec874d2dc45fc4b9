"""What a proxy is configured with: the `[proxy]` section, validated when built."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final

from kvrelay.client.addresses import parse_addresses
from kvrelay.core.errors import ConfigError

_HEADER: Final = re.compile(r"[A-Za-z0-9-]{0,64}")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
_COUNT_BOUNDS: Final = {
    "port": (0, 65_535),
    "workers": (1, 256),
    "max_body_bytes": (1024, 1 << 30),
    "max_choices": (1, 1024),
    "max_prompts": (1, 4096),
    "max_connections": (1, 1 << 20),
    "max_requests_in_flight": (1, 1 << 20),
}


class ToolFormat(StrEnum):
    """How a model writes its tool calls."""

    AUTO = "auto"
    """By what the model's chat template mentions."""
    HERMES = "hermes"
    """``<tool_call>{"name": …, "arguments": …}</tool_call>``: Hermes, Qwen."""
    LLAMA = "llama"
    """``{"name": …, "parameters": …}``: Llama 3.1 and later."""


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """One proxy: where it listens, which routers it asks, its bounds. Names ending in ``_s`` are seconds.

    `workers` processes share one port. `keys_file` empty: anybody may ask; else a file that
    ``kvrelay keys`` writes. `request_timeout_s` bounds each request. `max_choices` bounds `n`, `max_prompts`
    the prompts of one completions request; `max_requests_in_flight` and `max_connections` are a worker's.
    Port 0 takes a free one; the ready file says which.

    The tenant of a request is what the header `tenant_header` says (empty: no header is looked at), else the
    name of its API key, else its field `user`. `ttft_timeout_s` None: a first token may come at any time.

    Raises:
        ConfigError: with all faults, one a line.
    """

    routers: tuple[str, ...] = ("127.0.0.1:7070",)
    host: str = "0.0.0.0"
    port: int = 8000
    workers: int = 1
    keys_file: str = ""
    tool_format: ToolFormat = ToolFormat.AUTO
    request_timeout_s: float = 600.0
    ttft_timeout_s: float | None = None
    tenant_header: str = ""
    drain_timeout_s: float = 30.0
    max_body_bytes: int = 16 << 20
    max_choices: int = 16
    max_prompts: int = 128
    max_connections: int = 4096
    max_requests_in_flight: int = 4096
    ready_file: str = ""
    log_level: str = "info"

    def __post_init__(self) -> None:
        faults = []
        try:
            parse_addresses(self.routers)
        except ConfigError as error:
            faults.append(f"routers: {error.message}")
        if not self.host:
            faults.append("host must not be empty")
        if not _HEADER.fullmatch(self.tenant_header):
            faults.append(f"tenant_header must be the name of a header, got {self.tenant_header!r}")
        if self.log_level.lower() not in LOG_LEVELS:
            faults.append(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        faults += self._count_faults() + self._seconds_faults()
        if faults:
            raise ConfigError("\n".join(faults))

    def _count_faults(self) -> list[str]:
        return [
            f"{name} must be an integer from {low} to {high}, got {getattr(self, name)!r}"
            for name, (low, high) in _COUNT_BOUNDS.items()
            if not _is_whole(getattr(self, name), low, high)
        ]

    def _seconds_faults(self) -> list[str]:
        return [
            f"{spec.name} must be a number above 0 and at most 86400, got {getattr(self, spec.name)!r}"
            for spec in fields(self)
            if spec.name.endswith("_s")
            and not (spec.name == "ttft_timeout_s" and self.ttft_timeout_s is None)
            and not _is_patience(getattr(self, spec.name))
        ]


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_patience(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and 0 < value <= 86_400  # type: ignore[operator,arg-type]
