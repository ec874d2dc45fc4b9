"""The client-facing calls that tell: `WatchCluster`, `ListModels`, `GetTokenizer`, `Explain`."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from kvrelay.codec.client_api import (
    decode_explain,
    decode_get_tokenizer,
    decode_watch_cluster,
    encode_cluster_state,
    encode_explanation,
    encode_models,
    encode_tokenizer_chunk,
)
from kvrelay.core.cluster_view import ClusterState, ModelInfo
from kvrelay.core.errors import InvalidRequest, NodeUnavailable, Overloaded, UnknownModel
from kvrelay.core.tokenizer_chunk import split_tokenizer
from kvrelay.router.call_admission import only_model
from kvrelay.router.grpc_handlers import Context
from kvrelay.router.shell import RouterShell
from kvrelay.router.state_report import cluster_state, model_infos, without_times
from kvrelay.v1 import router_pb2


class InfoService:
    """Reads the shell's books; changes nothing."""

    def __init__(self, shell: RouterShell, router_id: str) -> None:
        self._shell = shell
        self._router_id = router_id
        self._num_watchers = 0

    def state(self) -> ClusterState:
        """The cluster's state, now."""
        uptime_s = self._shell.clock.now_s() - self._shell.started_s
        return cluster_state(self._shell.status(), self._router_id, uptime_s)

    async def watch_cluster(self, request: router_pb2.WatchClusterRequest, context: Context) -> None:
        """The state now, then at every change, at most once per interval.

        Raises:
            Overloaded: too many watch already.
        """
        interval_s, once = decode_watch_cluster(request)
        limit = self._shell.config.max_watchers
        if self._num_watchers >= limit:
            raise Overloaded(f"max_watchers ({limit}) watch already", retry_after_s=interval_s)
        self._num_watchers += 1
        try:
            await self._watch(interval_s, once, context)
        finally:
            self._num_watchers -= 1

    async def _watch(self, interval_s: float, once: bool, context: Context) -> None:
        told: ClusterState | None = None
        while not self._shell.is_draining or told is None:
            state = self.state()
            if told is None or without_times(state) != without_times(told):
                await context.write(encode_cluster_state(state))
                told = state
            if once:
                return
            await asyncio.sleep(interval_s)

    async def list_models(
        self, request: router_pb2.ListModelsRequest, context: Context
    ) -> router_pb2.ListModelsResponse:
        """The models that attached nodes serve.

        Raises:
            RouterUnavailable: none is attached, and this router has just started.
        """
        models = model_infos(self._shell.status())
        if not models and self._shell.may_be_blind:
            raise self._shell.blind("")
        return encode_models(models)

    async def explain(
        self, request: router_pb2.ExplainRequest, context: Context
    ) -> router_pb2.ExplainResponse:
        """The latest placement of a request, and what was measured of it.

        Raises:
            UnknownRequest: it is not remembered, or has not been placed yet.
        """
        explanation = self._shell.explain(decode_explain(request))
        return encode_explanation(replace(explanation, router_id=self._router_id))

    async def get_tokenizer(self, request: router_pb2.GetTokenizerRequest, context: Context) -> None:
        """A model's tokenizer bundle, in chunks.

        Raises:
            UnknownModel: the model is not served.
            InvalidRequest: it is not clear which model is meant, or the model has no tokenizer.
            NodeUnavailable: no node has sent the bundle yet.
        """
        model = self._find_model(decode_get_tokenizer(request))
        if not model.tokenizer_digest:
            raise InvalidRequest(
                f"model {model.name!r} is served without a tokenizer: send token ids", field="model"
            )
        bundle = await self._shell.tokenizers.get(model.tokenizer_digest, self._shell.config.tokenizer_wait_s)
        if bundle is None:
            raise NodeUnavailable(f"no node has sent the tokenizer of {model.name!r} yet", retry_after_s=1.0)
        for chunk in split_tokenizer(bundle):
            await context.write(encode_tokenizer_chunk(chunk))

    def _find_model(self, name: str) -> ModelInfo:
        models = {model.name: model for model in model_infos(self._shell.status())}
        if not name:
            return models[only_model(list(models))]
        if name not in models:
            served = ", ".join(models) or "nothing yet"
            raise UnknownModel(f"model {name!r} is not served here; served: {served}", field="model")
        return models[name]
