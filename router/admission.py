"""What is let in, and the bounded queue of what waits for a pair of nodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from kvrelay.core.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    NodeUnavailable,
    Overloaded,
    UnknownModel,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.router.cluster_state import ClusterState, ModelState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.events import RequestSubmitted
from kvrelay.router.ledger import Ledger, RequestEntry, RequestState

_RATE_MEMORY = 0.1
"""Weight of the newest interval between dispatches in their running mean."""


def check_names(event: RequestSubmitted, ledger: Ledger) -> None:
    """Refuse names that are in use.

    Raises:
        DuplicateRequest: a live request has that id, or that stream of that session.
    """
    if event.request_id in ledger.requests:
        raise DuplicateRequest(f"request_id {event.request_id!r} is in use", field="request_id")
    if event.stream_id in ledger.streams.get(event.session, ()):
        raise DuplicateRequest(f"stream_id {event.stream_id} is in use in this session", field="stream_id")


def find_model(name: str, cluster: ClusterState) -> ModelState:
    """The model's state.

    Raises:
        UnknownModel: other models are served, and the message names them.
        NodeUnavailable: nothing is served at all.
    """
    model = cluster.models.get(name)
    if model is not None:
        return model
    if not cluster.models:
        raise NodeUnavailable(f"no node is attached yet that serves model {name!r}, or any other")
    served = ", ".join(sorted(cluster.models))
    raise UnknownModel(f"model {name!r} is not served here; served: {served}", field="model")


def deadline_of(event: RequestSubmitted, config: RouterCoreConfig, now_s: float) -> float:
    """When the request's time is up, on the core's clock.

    Raises:
        DeadlineExceeded: it is already.
    """
    if event.deadline_s is None:
        return now_s + config.default_deadline_s
    if event.deadline_s <= now_s:
        raise DeadlineExceeded("the request's deadline had passed when it arrived")
    return min(event.deadline_s, now_s + config.max_deadline_s)


def completed_reason(
    request: TokenRequest, eos_token_ids: Collection[int], max_sequence_tokens: int
) -> FinishReason | None:
    """Why the output in `request` is complete already, or None when there is more to draw.

    A node may be lost between its last token and its report that this was the last.
    """
    if request.num_output_tokens == 0:
        return None
    last, sampling = request.token_ids[-1], request.sampling
    if last in sampling.stop_token_ids or (last in eos_token_ids and sampling.ends_at_eos):
        return FinishReason.STOP
    if request.num_remaining_tokens <= 0 or len(request.token_ids) >= max_sequence_tokens:
        return FinishReason.LENGTH
    return None


@dataclass(slots=True, eq=False)
class AdmissionQueue:
    """Requests that wait for a pair of nodes: first come, first served within a model.

    `max_queued_requests` bounds the newly submitted ones; continuations, which were let in once, go to the
    front and are bounded by what the nodes could run.
    """

    config: RouterCoreConfig
    waiting: dict[str, OrderedDict[int, RequestEntry]] = field(default_factory=dict)
    num_queued: int = 0
    mean_dispatch_interval_s: float = 0.0
    last_dispatch_s: float | None = None

    def enqueue(self, entry: RequestEntry) -> None:
        """A newly submitted request, behind all others of its model."""
        self._add(entry)

    def enqueue_first(self, entry: RequestEntry) -> None:
        """A continuation, before all others of its model."""
        self._add(entry)
        self.waiting[entry.model].move_to_end(entry.serial, last=False)

    def _add(self, entry: RequestEntry) -> None:
        assert entry.state is RequestState.QUEUED
        self.waiting.setdefault(entry.model, OrderedDict())[entry.serial] = entry
        self.num_queued += 1

    def remove(self, entry: RequestEntry) -> None:
        queue = self.waiting[entry.model]
        del queue[entry.serial]
        self.num_queued -= 1
        if not queue:
            del self.waiting[entry.model]

    def entries(self) -> Iterator[RequestEntry]:
        for queue in self.waiting.values():
            yield from queue.values()

    @property
    def is_over_bound(self) -> bool:
        return self.num_queued > self.config.max_queued_requests

    def record_dispatch(self, now_s: float) -> None:
        """Learn how fast the queue moves."""
        if self.last_dispatch_s is not None:
            interval_s = now_s - self.last_dispatch_s
            self.mean_dispatch_interval_s += _RATE_MEMORY * (interval_s - self.mean_dispatch_interval_s)
        self.last_dispatch_s = now_s

    def overloaded(self, text: str) -> Overloaded:
        """The error for a request that finds no room; says when the present queue should be served."""
        estimate_s = self.num_queued * self.mean_dispatch_interval_s
        retry_after_s = min(max(estimate_s, self.config.min_retry_after_s), self.config.max_retry_after_s)
        return Overloaded(text, retry_after_s=retry_after_s)
