"""The client-facing service `Router`: its methods and who serves them."""

from __future__ import annotations

from typing import Final

import grpc

from kvrelay.router.drain_service import DrainService
from kvrelay.router.generate_service import GenerateService
from kvrelay.router.grpc_handlers import both_streams, register, server_stream, unary
from kvrelay.router.info_service import InfoService
from kvrelay.v1 import router_pb2

SERVICE_NAME: Final = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


def register_router(
    server: grpc.aio.Server, generate: GenerateService, info: InfoService, drain: DrainService
) -> None:
    """Serve all methods of `Router`."""
    handlers = {
        "Generate": server_stream(generate.generate, router_pb2.GenerateRequest),
        "Session": both_streams(generate.session, router_pb2.SessionRequest),
        "Cancel": unary(generate.cancel, router_pb2.CancelRequest),
        "Explain": unary(info.explain, router_pb2.ExplainRequest),
        "WatchCluster": server_stream(info.watch_cluster, router_pb2.WatchClusterRequest),
        "ListModels": unary(info.list_models, router_pb2.ListModelsRequest),
        "DrainNode": unary(drain.drain_node, router_pb2.DrainNodeRequest),
        "GetTokenizer": server_stream(info.get_tokenizer, router_pb2.GetTokenizerRequest),
    }
    register(server, SERVICE_NAME, handlers)
