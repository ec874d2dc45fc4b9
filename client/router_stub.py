"""The generated stub of the `Router` service, with the types that the generator leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import grpc

from kvrelay.v1 import router_pb2_grpc

if TYPE_CHECKING:
    from kvrelay.v1.common_pb2 import TokenizerChunk
    from kvrelay.v1.router_pb2 import (
        CancelRequest,
        CancelResponse,
        ClusterState,
        DrainNodeRequest,
        DrainNodeResponse,
        ExplainRequest,
        ExplainResponse,
        GetTokenizerRequest,
        ListModelsRequest,
        ListModelsResponse,
        SessionRequest,
        SessionResponse,
        WatchClusterRequest,
    )


class RouterStub(Protocol):
    """The calls that this client makes."""

    Session: Callable[[], grpc.aio.StreamStreamCall[SessionRequest, SessionResponse]]
    Cancel: grpc.aio.UnaryUnaryMultiCallable[CancelRequest, CancelResponse]
    Explain: grpc.aio.UnaryUnaryMultiCallable[ExplainRequest, ExplainResponse]
    DrainNode: grpc.aio.UnaryUnaryMultiCallable[DrainNodeRequest, DrainNodeResponse]
    WatchCluster: grpc.aio.UnaryStreamMultiCallable[WatchClusterRequest, ClusterState]
    ListModels: grpc.aio.UnaryUnaryMultiCallable[ListModelsRequest, ListModelsResponse]
    GetTokenizer: grpc.aio.UnaryStreamMultiCallable[GetTokenizerRequest, TokenizerChunk]


def make_router_stub(channel: grpc.aio.Channel) -> RouterStub:
    """The stub on a channel."""
    return cast("RouterStub", router_pb2_grpc.RouterStub(channel))  # type: ignore[no-untyped-call]
