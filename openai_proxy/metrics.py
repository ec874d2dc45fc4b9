"""The proxy's Prometheus figures; with several workers, of all of them together.

Several processes meet in the folder of ``PROMETHEUS_MULTIPROC_DIR``, which must be set before this module
is imported.
"""

from __future__ import annotations

import os
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

MULTIPROC_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_DURATION_BUCKETS_S: Final = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class ProxyMetrics:
    """One worker's counts, and the exposition of all workers'."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "kvrelay_proxy_requests",
            "Answered HTTP requests",
            ("path", "status"),
            registry=self._registry,
        )
        self._refused = Counter(
            "kvrelay_proxy_requests_refused",
            "HTTP requests refused before they were read: by key, limit or size",
            ("status",),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "kvrelay_proxy_request_seconds",
            "From a request's arrival to the end of its answer",
            ("path",),
            buckets=_DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self._running = Gauge(
            "kvrelay_proxy_requests_running",
            "HTTP requests under way",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._answers = Counter(
            "kvrelay_proxy_answers", "Finished answers", ("finish_reason",), registry=self._registry
        )
        self._tokens = Counter(
            "kvrelay_proxy_tokens",
            "Tokens of finished answers (prompt_cached: those of the prompt that a prefix cache held)",
            ("kind",),
            registry=self._registry,
        )

    def begin(self) -> None:
        """A request has come."""
        self._running.inc()

    def end(self, path: str, status: int, seconds: float) -> None:
        """Its answer has left, or its caller has."""
        self._running.dec()
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def refuse(self, status: int) -> None:
        """A request was not let in."""
        self._refused.labels(str(status)).inc()

    def count_answer(self, reason: str, num_prompt: int, num_cached: int, num_output: int) -> None:
        """One choice of an answer, with its tokens."""
        self._answers.labels(str(reason)).inc()
        for kind, number in (("prompt", num_prompt), ("prompt_cached", num_cached), ("output", num_output)):
            self._tokens.labels(kind).inc(number)

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        if MULTIPROC_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        merged = CollectorRegistry()
        MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return generate_latest(merged)
