"""What Prometheus is told. Counting is a few additions per request; states are read when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.node_messages import Role
from kvrelay.core.request_report import RequestReport

_TTFT_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
_TPOT_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)

_COUNTERS: Final = {
    "tokens": "Output tokens delivered to client streams.",
    "attempts": "Attempts dispatched to a pair of nodes.",
    "continuations": "Attempts that continued what an earlier one had begun.",
    "attempts_refused": "Attempts that a node refused.",
    "attempts_failed": "Attempts that failed.",
    "nodes_lost": "Node streams that were lost.",
    "prompt_tokens": "Prompt tokens of finished requests.",
    "pulls": "Prefixes that a prefill node was to take from another node.",
    "pulls_failed": "Prefixes that could not be taken, and were computed.",
    "pulled_tokens": "Prompt tokens whose KV a prefill node took from another node.",
    "kv_bytes": "Bytes of KV that were handed off.",
    "overdue_releases": "Releases that a node did not acknowledge in time.",
}
_TRIAL_COUNTERS: Final = {
    "queue_trials": "Requests that were to be refused by their deadline, and were served all the same.",
    "queue_trials_in_time": "Of these, those whose first token was in time: such refusals are false.",
}
_INDEX_COUNTERS: Final = {
    "events": ("kv_events", "Events in which nodes said what blocks they hold."),
    "gaps": ("kv_gaps", "Times that events of a node were missing, so that a snapshot was asked for."),
}


class RouterMetrics:
    """One router's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.num_node_frames = 0
        self.num_session_messages = 0
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "kvrelay_requests", "Requests by outcome.", ["outcome"], registry=self._registry
        )
        self._ttft_s = Histogram(
            "kvrelay_ttft_seconds",
            "Arrival to first token.",
            buckets=_TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._queue_s = Histogram(
            "kvrelay_queue_seconds",
            "Arrival to dispatch.",
            buckets=_TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._tpot_s = Histogram(
            "kvrelay_tpot_seconds",
            "(End-to-end - TTFT) / (output tokens - 1), of one request.",
            buckets=_TPOT_BUCKETS_S,
            registry=self._registry,
        )

    def count_request(self, outcome: str) -> None:
        """One request has ended: `outcome` is a finish reason or an error's code."""
        self._requests.labels(outcome.lower()).inc()

    def count_finished(self, outcome: str, report: RequestReport) -> None:
        """One request has ended well."""
        self.count_request(outcome)
        self._ttft_s.observe(report.ttft_s)
        self._queue_s.observe(report.queue_s)
        if report.num_output_tokens > 1:
            self._tpot_s.observe((report.total_s - report.ttft_s) / (report.num_output_tokens - 1))

    def watch(self, read_state: Callable[[], ClusterState]) -> None:
        """Where the state comes from at each scrape."""
        self._registry.register(_StateCollector(self, read_state))

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _StateCollector(Collector):
    def __init__(self, metrics: RouterMetrics, read_state: Callable[[], ClusterState]) -> None:
        self._metrics = metrics
        self._read_state = read_state

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        state = self._read_state()
        live = GaugeMetricFamily("kvrelay_live_requests", "Live requests by ledger state.", labels=["state"])
        for name, number in state.num_requests.items():
            live.add_metric([name], number)
        yield live
        yield GaugeMetricFamily(
            "kvrelay_queue_length", "Requests that wait for nodes.", state.num_requests.get("queued", 0)
        )
        yield from _queues(state)
        yield _nodes_by_role(state)
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"kvrelay_{name}", text, state.counters.get(name, 0))
        yield from _index(state)
        frames = CounterMetricFamily("kvrelay_frames", "Messages on streams.", labels=["stream"])
        frames.add_metric(["node"], self._metrics.num_node_frames)
        frames.add_metric(["session"], self._metrics.num_session_messages)
        yield frames


def _index(state: ClusterState) -> Iterable[Metric]:
    index = state.index
    yield GaugeMetricFamily("kvrelay_index_entries", "Blocks on nodes in the block index.", index.num_entries)
    yield GaugeMetricFamily("kvrelay_index_max_entries", "Its bound on entries.", index.max_entries)
    yield GaugeMetricFamily("kvrelay_index_bytes", "About what the block index takes.", index.num_bytes)
    evicted = "Entries that the block index dropped because of its bound."
    yield CounterMetricFamily("kvrelay_index_evicted", evicted, index.num_evicted)
    stale = "Nodes whose blocks are guessed, as their events are missing."
    num_stale = sum(node.index_stale for node in state.nodes)
    yield GaugeMetricFamily("kvrelay_index_stale_nodes", stale, num_stale)
    for name, (counter, text) in _INDEX_COUNTERS.items():
        yield CounterMetricFamily(f"kvrelay_index_{name}", text, state.counters.get(counter, 0))


def _queues(state: ClusterState) -> Iterable[Metric]:
    waiting = GaugeMetricFamily("kvrelay_queue_requests", "Requests that wait.", labels=["priority"])
    most = GaugeMetricFamily("kvrelay_queue_max_requests", "How many may wait.", labels=["priority"])
    text = "Requests that were not served, by reason."
    refused = CounterMetricFamily("kvrelay_queue_refused", text, labels=["priority", "reason"])
    for queue in state.queues:
        waiting.add_metric([queue.priority.value], queue.num_queued)
        most.add_metric([queue.priority.value], queue.max_queued)
        for reason, number in queue.refused.items():
            refused.add_metric([queue.priority.value, reason], number)
    yield from (waiting, most, refused)
    for name, text in _TRIAL_COUNTERS.items():
        yield CounterMetricFamily(f"kvrelay_{name}", text, state.counters.get(name, 0))


def _nodes_by_role(state: ClusterState) -> GaugeMetricFamily:
    nodes = GaugeMetricFamily("kvrelay_nodes", "Attached nodes.", labels=["role", "draining"])
    for role in Role:
        for draining in (False, True):
            number = sum(node.role is role and node.draining is draining for node in state.nodes)
            nodes.add_metric([role.value, str(draining).lower()], number)
    return nodes
