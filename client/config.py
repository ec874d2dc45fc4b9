"""What a client may be told, and the bounds it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvrelay.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Bounds and patience of one client. Names ending in ``_s`` are seconds.

    `max_retries` counts failures in a row without a new token; `max_continuations` counts how often one
    request may be taken up again after its first token. A pause before retry n is
    ``backoff_base_s * 2**n``, at most `backoff_max_s`, drawn between its half and its whole, and never
    shorter than a router's own `retry_after_s`.
    A router from which nothing comes for `keepalive_time_s` while a call is open is asked whether it lives,
    and given up when it has not said so within `keepalive_timeout_s`; routers won't be asked more often than
    every 5 s.
    `max_buffered_tokens` bounds what waits for a slow reader of one request; beyond it that request fails.
    Texts that take more than about a millisecond are tokenized on at most `max_tokenizing_threads` threads;
    each of at most `max_tokenizers` tokenizers remembers texts in `tokenized_text_max_bytes` (0: none).
    `cache_dir` None: see `default_cache_dir`.

    Raises:
        ConfigError: naming every field that is out of range, one a line.
    """

    connect_timeout_s: float = 5.0
    call_timeout_s: float = 30.0
    max_retries: int = 5
    max_continuations: int = 16
    backoff_base_s: float = 0.1
    backoff_max_s: float = 5.0
    max_requests_in_flight: int = 4096
    max_buffered_tokens: int = 131_072
    max_message_bytes: int = 64 << 20
    models_max_age_s: float = 30.0
    max_tokenizers: int = 8
    max_tokenizing_threads: int = 4
    tokenized_text_max_bytes: int = 32 << 20
    keepalive_time_s: float = 6.0
    keepalive_timeout_s: float = 5.0
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        faults = [
            *self._seconds_faults(),
            *self._count_fault("max_retries", 0, 1000),
            *self._count_fault("max_continuations", 0, 1000),
            *self._count_fault("max_requests_in_flight", 1, 1 << 20),
            *self._count_fault("max_buffered_tokens", 1, 1 << 31),
            *self._count_fault("max_message_bytes", 1 << 16, 1 << 30),
            *self._count_fault("max_tokenizers", 1, 1024),
            *self._count_fault("max_tokenizing_threads", 1, 1024),
            *self._count_fault("tokenized_text_max_bytes", 0, 1 << 40),
        ]
        if faults:
            raise ConfigError("\n".join(message for _, message in faults), field=faults[0][0])

    def _seconds_faults(self) -> list[tuple[str, str]]:
        seconds = {name: getattr(self, name) for name in self.__slots__ if name.endswith("_s")}
        return [
            (name, f"{name} must be a number above 0 and at most 86400, got {value!r}")
            for name, value in seconds.items()
            if isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not 0 < value <= 86_400
        ]

    def _count_fault(self, name: str, low: int, high: int) -> list[tuple[str, str]]:
        value = getattr(self, name)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return []
        return [(name, f"{name} must be an integer from {low} to {high}, got {value!r}")]


def default_cache_dir(environ: Mapping[str, str]) -> Path | None:
    """Where tokenizers are kept: ``tokenizers`` within ``$KVRELAY_CACHE``, else within
    ``$XDG_CACHE_HOME/kvrelay``, else within ``~/.cache/kvrelay``. None: there is no home directory.
    """
    try:
        if own := environ.get("KVRELAY_CACHE"):
            return Path(own).expanduser().absolute() / "tokenizers"
        if (shared := environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():
            return Path(shared) / "kvrelay" / "tokenizers"
        return Path.home() / ".cache" / "kvrelay" / "tokenizers"
    except RuntimeError:
        return None
