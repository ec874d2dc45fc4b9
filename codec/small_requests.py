"""The `Router` service's requests that hold one or two fields."""

from __future__ import annotations

from typing import Final

from kvrelay.codec.bounds import seconds, text
from kvrelay.codec.node_hello import MAX_NAME_CHARS
from kvrelay.core.client_types import MAX_MODEL_CHARS, MAX_REQUEST_ID_CHARS
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import NodeId
from kvrelay.v1 import router_pb2

DEFAULT_WATCH_INTERVAL_S: Final = 1.0
MIN_WATCH_INTERVAL_S: Final = 0.1
MAX_WATCH_INTERVAL_S: Final = 3600.0


def encode_cancel(request_id: str) -> router_pb2.CancelRequest:
    """Which request to cancel."""
    return router_pb2.CancelRequest(request_id=request_id)


def decode_cancel(pb: router_pb2.CancelRequest) -> str:
    """Which request to cancel. Raises InvalidRequest."""
    return text(pb.request_id, "request_id", MAX_REQUEST_ID_CHARS, is_required=True)


def encode_explain(request_id: str) -> router_pb2.ExplainRequest:
    """Which request's placement to explain."""
    return router_pb2.ExplainRequest(request_id=request_id)


def decode_explain(pb: router_pb2.ExplainRequest) -> str:
    """Which request's placement to explain. Raises InvalidRequest."""
    return text(pb.request_id, "request_id", MAX_REQUEST_ID_CHARS, is_required=True)


def encode_drain_node(node_id: str) -> router_pb2.DrainNodeRequest:
    """Which node is to leave."""
    return router_pb2.DrainNodeRequest(node_id=node_id)


def decode_drain_node(pb: router_pb2.DrainNodeRequest) -> NodeId:
    """Which node is to leave. Raises InvalidRequest."""
    return NodeId(text(pb.node_id, "node_id", MAX_NAME_CHARS, is_required=True))


def encode_watch_cluster(interval_s: float = 0.0, *, once: bool = False) -> router_pb2.WatchClusterRequest:
    """How often to hear of the cluster; 0 is the router's default."""
    return router_pb2.WatchClusterRequest(interval_s=interval_s, once=once)


def decode_watch_cluster(pb: router_pb2.WatchClusterRequest) -> tuple[float, bool]:
    """The interval in seconds, and whether one state is enough.

    Raises:
        InvalidRequest: the interval is out of range.
    """
    interval_s = seconds(pb.interval_s, "interval_s")
    if interval_s == 0.0:
        return DEFAULT_WATCH_INTERVAL_S, pb.once
    if not MIN_WATCH_INTERVAL_S <= interval_s <= MAX_WATCH_INTERVAL_S:
        raise InvalidRequest(
            f"interval_s must be 0, or from {MIN_WATCH_INTERVAL_S:g} to {MAX_WATCH_INTERVAL_S:g},"
            f" got {interval_s:g}",
            field="interval_s",
        )
    return interval_s, pb.once


def encode_get_tokenizer(model: str = "") -> router_pb2.GetTokenizerRequest:
    """Whose tokenizer; empty: the only model's."""
    return router_pb2.GetTokenizerRequest(model=model)


def decode_get_tokenizer(pb: router_pb2.GetTokenizerRequest) -> str:
    """Whose tokenizer. Raises InvalidRequest."""
    return text(pb.model, "model", MAX_MODEL_CHARS)
