"""The asynchronous client: what programs on an event loop use, and what `Client` and the proxy stand on."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Final, Self, Unpack

import grpc

from kvrelay.client.addresses import DEFAULT_PORT, parse_addresses
from kvrelay.client.chat_template import check_template_inputs
from kvrelay.client.config import ClientConfig, default_cache_dir
from kvrelay.client.generation import Generation, GenerationParts
from kvrelay.client.generation_ask import (
    MAX_TOOLS,
    AskOptions,
    GenerationAsk,
    PreparedCall,
    check_messages,
    check_text,
    check_token_ids,
    make_ask,
    prepare_call,
)
from kvrelay.client.generation_stream import GenerationStream
from kvrelay.client.in_flight import InFlight
from kvrelay.client.model_catalog import ModelCatalog
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.client.named_nodes import NamedNodes
from kvrelay.client.named_requests import NamedRequests
from kvrelay.client.request_progress import retry_pause_s
from kvrelay.client.results import GenerationResult
from kvrelay.client.router_link import RouterLink
from kvrelay.client.router_set import RouterSet, unreadable
from kvrelay.client.tokenizer_cache import TokenizerCache
from kvrelay.client.tokenizing import Tokenizing
from kvrelay.codec.client_api import (
    decode_cluster_state,
    decode_watch_cluster,
    encode_watch_cluster,
)
from kvrelay.core.cluster_view import ClusterState, ModelInfo
from kvrelay.core.errors import InvalidRequest, KVRelayError, RouterUnavailable
from kvrelay.core.explanation import Explanation

DEFAULT_ADDRESS: Final = f"127.0.0.1:{DEFAULT_PORT}"
DEFAULT_CONFIG: Final = ClientConfig()


class AsyncClient:
    """A client of one cluster, through any of its routers. Use it with ``async with``, on one event loop.

    `addresses` are its routers', ``host[:port]``, in a sequence or separated by commas. Nothing is dialled
    before it is needed; what a router's loss interrupts goes on through another.

    Raises:
        ConfigError: no address is given, or one can't be read.
    """

    def __init__(
        self, addresses: str | Sequence[str] = DEFAULT_ADDRESS, *, config: ClientConfig = DEFAULT_CONFIG
    ) -> None:
        rng = random.Random()
        cache = TokenizerCache(config.cache_dir or default_cache_dir(os.environ))
        self._config = config
        self._rng = rng
        self._routers = RouterSet(parse_addresses(addresses), config, rng, time.monotonic)
        self._catalog = ModelCatalog(self._routers, config, cache, time.monotonic)
        self._named = NamedRequests(self._routers, config)
        self._nodes = NamedNodes(self._routers, config)
        self._tokenizing = Tokenizing(
            config.max_tokenizing_threads, max_waiting=config.max_requests_in_flight
        )
        in_flight = InFlight(config.max_requests_in_flight)
        self._parts = GenerationParts(
            self._routers,
            config,
            rng,
            in_flight,
            time.monotonic,
            self._prepare,
            self._named.cancel_leftover,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is under way and close all connections."""
        self._tokenizing.close()
        await self._routers.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The routers, as ``host:port``."""
        return self._routers.addresses

    @property
    def num_requests_in_flight(self) -> int:
        """Requests that have started and not ended."""
        return self._parts.in_flight.num_requests

    # ---- generating -----------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[int] | None = None, **options: Unpack[AskOptions]
    ) -> GenerationStream:
        """The answer to `prompt` (text or token ids) or to ``messages``, as it comes.

        Options, all of which may be left out:

        * ``messages``: a conversation, by the model's chat template, which also gets ``tools``,
          ``template_variables`` and ``add_generation_prompt`` (true). ``chat``: a text prompt becomes one
          user message; without it, it is tokenized as it is.
        * ``model``: may be left out where one is served.
        * ``sampling``: `SamplingParams`; greedy, 256 tokens.
        * ``stop``: the answer ends before the first of these texts, with ``include_stop`` after it.
        * ``timeout_s``: counts from the first read. ``request_id``: drawn unless given.
        * ``priority`` (``high``, ``normal``, ``low``), ``tenant``: for the routers' queues.
          ``ttft_timeout_s``: a first token that can't be out by then is not wanted.
        * ``cache_salt``: prompts share cached prefixes only under the same one.
        * ``decode_text`` False leaves texts empty, and needs no tokenizer; ``skip_special_tokens`` False
          shows special tokens.

        Raises:
            InvalidRequest: naming the `field`; nothing has been sent.
            ContextLengthExceeded: the prompt is longer than any model takes.
        """
        return GenerationStream(Generation(make_ask(prompt, options), self._parts))

    async def complete(
        self, prompt: str | Sequence[int] | None = None, **options: Unpack[AskOptions]
    ) -> GenerationResult:
        """The whole answer at once; arguments and errors as for `generate` and its stream."""
        stream = self.generate(prompt, **options)
        async for _ in stream:
            pass
        return stream.result

    async def cancel(self, request_id: str) -> None:
        """Cancel a request by its id, whoever started it, at whichever router has it.

        Raises:
            UnknownRequest: no router has it.
            KVRelayError: no router that answered has it, and not all answered.
        """
        await self._named.cancel(request_id)

    async def drain_node(self, node_id: str) -> None:
        """Have a node leave: it takes nothing new, finishes what it holds or hands it back when its
        `drain_timeout_s` is over, and ends. Returns when it has been told, by each router that has it.

        Raises:
            UnknownNode: no router has such a node.
            KVRelayError: no router that answered has it, and not all answered.
        """
        await self._nodes.drain(node_id)

    # ---- looking --------------------------------------------------------------------------------

    async def list_models(self) -> tuple[ModelInfo, ...]:
        """The models that are served now."""
        return await self._catalog.list_models()

    async def find_model(self, model: str = "") -> ModelInfo:
        """The model of that name; empty: the only one. What was heard lately is believed.

        Raises:
            UnknownModel: others are served.
            InvalidRequest: `model` is empty and several are served.
            NodeUnavailable: none is served.
        """
        if not isinstance(model, str):
            raise InvalidRequest(f"model must be a string, got {model!r}", field="model")
        return await self._catalog.find(model)

    async def cluster_state(self) -> ClusterState:
        """The cluster as one router sees it now."""
        return await self._routers.call(self._cluster_state_at)

    async def explain(self, request_id: str) -> Explanation:
        """The latest placement of a request, live or ended: every candidate with the terms of its score,
        predicted and measured times. All routers are asked; of several that know the request, the one that
        placed it last is believed.

        Raises:
            UnknownRequest: no router remembers it, or it waits for its first placement; says how many
                requests the router remembers.
            KVRelayError: no router that answered knows it, and not all answered.
        """
        return await self._named.explain(request_id)

    async def watch_cluster(self, interval_s: float = 0.0) -> AsyncGenerator[ClusterState, None]:
        """The cluster now, then again at every change, `interval_s` apart at least (0: the router's
        default). Goes on through another router when one is lost.

        Raises:
            InvalidRequest: `interval_s` is out of range.
            RouterUnavailable: no router has answered for a while.
        """
        decode_watch_cluster(encode_watch_cluster(interval_s))
        num_failures, last = 0, ""
        while True:
            try:
                link = await self._routers.connect(last=last)
                last = link.address
                async with aclosing(self._watch_at(link, interval_s)) as states:
                    async for state in states:
                        num_failures = 0
                        yield state
            except KVRelayError as error:
                num_failures += 1
                if not error.retryable or num_failures > self._config.max_retries:
                    raise
                await asyncio.sleep(retry_pause_s(num_failures - 1, error, self._config, self._rng))

    async def _cluster_state_at(self, link: RouterLink) -> ClusterState:
        call = link.stub.WatchCluster(encode_watch_cluster(once=True), timeout=self._config.call_timeout_s)
        try:
            async for pb in call:
                return decode_cluster_state(pb)
        except InvalidRequest as error:
            raise unreadable(link.address, error) from error
        finally:
            call.cancel()
        raise RouterUnavailable(f"router {link.address} showed no cluster state")

    # ---- tokenizing -----------------------------------------------------------------------------

    async def tokenizer(self, model: str = "") -> ModelTokenizer:
        """The model's tokenizer and chat template, fetched once and kept.

        Raises:
            InvalidRequest: no router has a tokenizer of it, or `model` is empty and several are served.
            UnknownModel: it is not served.
        """
        if not isinstance(model, str):
            raise InvalidRequest(f"model must be a string, got {model!r}", field="model")
        info = await self._catalog.find(model)
        found = await self._catalog.tokenizer_of(info)
        if found is None:
            raise InvalidRequest(f"model {info.name!r} has no tokenizer; send token ids", field="model")
        return found

    async def tokenize(
        self, text: str, *, model: str = "", add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a text, as `generate` makes them of a prompt."""
        check_text(text, "text")
        tokenizer = await self.tokenizer(model)
        return await self._tokenizing.encode(tokenizer, text, add_special_tokens=add_special_tokens)

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        model: str = "",
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, object] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, as `generate` makes them of ``messages``."""
        check_messages(messages)
        check_template_inputs(tools, template_variables, max_tools=MAX_TOOLS)
        tokenizer = await self.tokenizer(model)
        return await self._tokenizing.encode_chat(
            tokenizer,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=template_variables,
        )

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True
    ) -> str:
        """Text of token ids."""
        check_token_ids(token_ids, "token_ids")
        tokenizer = await self.tokenizer(model)
        return await self._tokenizing.decode(tokenizer, token_ids, skip_special_tokens=skip_special_tokens)

    async def _prepare(self, ask: GenerationAsk) -> PreparedCall:
        return await prepare_call(ask, self._catalog, self._tokenizing)

    async def _watch_at(self, link: RouterLink, interval_s: float) -> AsyncGenerator[ClusterState, None]:
        call = link.stub.WatchCluster(encode_watch_cluster(interval_s))
        try:
            async for pb in call:
                yield decode_cluster_state(pb)
        except InvalidRequest as error:
            raise unreadable(link.address, error) from error
        except grpc.aio.AioRpcError as error:
            raise self._routers.fault_of(link, error) from error
        finally:
            call.cancel()
        raise RouterUnavailable(f"router {link.address} ended the watch")
