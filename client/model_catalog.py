"""The models that routers serve, and their tokenizers: asked once, then kept, in memory and on disk."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from kvrelay.client.config import ClientConfig
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.client.router_link import RouterLink
from kvrelay.client.router_set import RouterSet, unreadable
from kvrelay.client.tokenizer_cache import TokenizerCache
from kvrelay.codec.client_api import decode_models, decode_tokenizer_chunk, encode_get_tokenizer
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.errors import InvalidRequest, NodeUnavailable, RouterUnavailable, UnknownModel
from kvrelay.core.tokenizer_chunk import TokenizerAssembly
from kvrelay.v1 import router_pb2


class ModelCatalog:
    """Used on one event loop. Bounded: `max_tokenizers` in memory, and what `TokenizerCache` keeps."""

    def __init__(
        self, routers: RouterSet, config: ClientConfig, cache: TokenizerCache, now_s: Callable[[], float]
    ) -> None:
        self._routers = routers
        self._config = config
        self._cache = cache
        self._now_s = now_s
        self._models: tuple[ModelInfo, ...] = ()
        self._models_until_s = 0.0
        self._tokenizers: OrderedDict[str, ModelTokenizer] = OrderedDict()
        self._fetching = asyncio.Lock()

    async def list_models(self) -> tuple[ModelInfo, ...]:
        """What is served now, by name."""
        self._models = await self._routers.call(self._list_models)
        self._models_until_s = self._now_s() + self._config.models_max_age_s
        return self._models

    async def find(self, model: str) -> ModelInfo:
        """The model of that name; empty: the only one. What was heard lately is believed.

        Raises:
            UnknownModel: others are served; names them.
            InvalidRequest: `model` is empty and several are served.
            NodeUnavailable: none is served.
        """
        if self._now_s() < self._models_until_s and (known := _pick(self._models, model)):
            return known
        if found := _pick(await self.list_models(), model):
            return found
        if not self._models:
            raise NodeUnavailable("no node is attached that serves a model")
        served = ", ".join(repr(info.name) for info in self._models)
        if model:
            raise UnknownModel(f"model {model!r} is not served here; served: {served}", field="model")
        raise InvalidRequest(f"model must be given, because several are served: {served}", field="model")

    async def tokenizer_of(self, model: ModelInfo) -> ModelTokenizer | None:
        """The model's tokenizer: from memory, from disk, or from a router. None: no router has one.

        Raises:
            KVRelayError: it could not be had, or can't be read.
        """
        digest = model.tokenizer_digest
        if not digest:
            return None
        if (tokenizer := self._tokenizers.get(digest)) is None:
            async with self._fetching:
                if (tokenizer := self._tokenizers.get(digest)) is None:
                    tokenizer = await self._load(model)
        self._keep(digest, tokenizer)
        return tokenizer

    async def _load(self, model: ModelInfo) -> ModelTokenizer:
        digest = model.tokenizer_digest
        bundle = await asyncio.to_thread(self._cache.read, digest)
        if bundle is None:
            bundle = await self._routers.call(lambda link: self._fetch(link, model))
            await asyncio.to_thread(self._cache.write, digest, bundle)
        max_cache_bytes = self._config.tokenized_text_max_bytes
        return await asyncio.to_thread(ModelTokenizer, bundle, max_cache_bytes=max_cache_bytes)

    def _keep(self, digest: str, tokenizer: ModelTokenizer) -> None:
        self._tokenizers[digest] = tokenizer
        self._tokenizers.move_to_end(digest)
        while len(self._tokenizers) > self._config.max_tokenizers:
            self._tokenizers.popitem(last=False)

    async def _list_models(self, link: RouterLink) -> tuple[ModelInfo, ...]:
        request = router_pb2.ListModelsRequest()
        pb = await link.stub.ListModels(request, timeout=self._config.call_timeout_s)
        try:
            return decode_models(pb)
        except InvalidRequest as error:
            raise unreadable(link.address, error) from error

    async def _fetch(self, link: RouterLink, model: ModelInfo) -> bytes:
        assembly = TokenizerAssembly(model.tokenizer_digest)
        call = link.stub.GetTokenizer(encode_get_tokenizer(model.name), timeout=self._config.call_timeout_s)
        try:
            async for pb in call:
                if (bundle := assembly.add(decode_tokenizer_chunk(pb))) is not None:
                    return bundle
        except InvalidRequest as error:
            raise unreadable(link.address, error) from error
        finally:
            call.cancel()
        raise RouterUnavailable(f"router {link.address} sent only a part of the tokenizer of {model.name!r}")


def _pick(models: tuple[ModelInfo, ...], name: str) -> ModelInfo | None:
    if not name:
        return models[0] if len(models) == 1 else None
    return next((info for info in models if info.name == name), None)
