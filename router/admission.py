"""What a request must satisfy to be let in at all."""

from __future__ import annotations

from collections.abc import Collection

from kvrelay.core.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    NodeUnavailable,
    UnknownModel,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.router.cluster_state import ClusterState, ModelState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.events import RequestSubmitted
from kvrelay.router.ledger import Ledger


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
