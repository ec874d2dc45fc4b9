"""The blocking client: the asynchronous one on a thread of its own. Any number of threads may use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, Unpack

from kvrelay.client.async_client import DEFAULT_ADDRESS, DEFAULT_CONFIG, AsyncClient
from kvrelay.client.config import ClientConfig
from kvrelay.client.generation_ask import AskOptions
from kvrelay.client.generation_stream import GenerationStream
from kvrelay.client.loop_thread import LoopThread
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.client.results import GenerationChunk, GenerationResult
from kvrelay.core.cluster_view import ClusterState, ModelInfo
from kvrelay.core.errors import RequestCancelled
from kvrelay.core.explanation import Explanation


class Client:
    """As `AsyncClient`, but calls block and streams are plain iterators. Close it, or use ``with``.

    Raises:
        ConfigError: no address is given, or one can't be read.
    """

    def __init__(
        self, addresses: str | Sequence[str] = DEFAULT_ADDRESS, *, config: ClientConfig = DEFAULT_CONFIG
    ) -> None:
        self._client = AsyncClient(addresses, config=config)
        self._thread = LoopThread("kvrelay client")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way, close all connections, end the thread."""
        with suppress(RequestCancelled):  # closed already
            self._thread.run(self._client.aclose)
        self._thread.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The routers, as ``host:port``."""
        return self._client.addresses

    def generate(
        self, prompt: str | Sequence[int] | None = None, **options: Unpack[AskOptions]
    ) -> BlockingStream:
        """The answer as it comes; see `AsyncClient.generate`."""
        return BlockingStream(self._client.generate(prompt, **options), self._thread)

    def complete(
        self, prompt: str | Sequence[int] | None = None, **options: Unpack[AskOptions]
    ) -> GenerationResult:
        """The whole answer at once; see `AsyncClient.complete`."""
        return self._thread.run(lambda: self._client.complete(prompt, **options))

    def cancel(self, request_id: str) -> None:
        """Cancel a request by its id; see `AsyncClient.cancel`."""
        self._thread.run(lambda: self._client.cancel(request_id))

    def drain_node(self, node_id: str) -> None:
        """Have a node leave; see `AsyncClient.drain_node`."""
        self._thread.run(lambda: self._client.drain_node(node_id))

    def explain(self, request_id: str) -> Explanation:
        """The latest placement of a request, live or ended; see `AsyncClient.explain`."""
        return self._thread.run(lambda: self._client.explain(request_id))

    def list_models(self) -> tuple[ModelInfo, ...]:
        """The models that are served now."""
        return self._thread.run(self._client.list_models)

    def cluster_state(self) -> ClusterState:
        """The cluster as one router sees it now."""
        return self._thread.run(self._client.cluster_state)

    def watch_cluster(self, interval_s: float = 0.0) -> Iterator[ClusterState]:
        """The cluster now and at every change; see `AsyncClient.watch_cluster`."""
        watch = self._client.watch_cluster(interval_s)
        try:
            while (state := self._thread.run(lambda: anext(watch, None))) is not None:
                yield state
        finally:
            with suppress(RequestCancelled):  # the client was closed meanwhile
                self._thread.run(watch.aclose)

    def tokenizer(self, model: str = "") -> ModelTokenizer:
        """The model's tokenizer and chat template."""
        return self._thread.run(lambda: self._client.tokenizer(model))

    def tokenize(self, text: str, *, model: str = "", add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, as `generate` makes them of a prompt."""
        return self._thread.run(
            lambda: self._client.tokenize(text, model=model, add_special_tokens=add_special_tokens)
        )

    def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        model: str = "",
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, object] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation; see `AsyncClient.tokenize_chat`."""
        return self._thread.run(
            lambda: self._client.tokenize_chat(
                messages,
                tools=tools,
                model=model,
                add_generation_prompt=add_generation_prompt,
                template_variables=template_variables,
            )
        )

    def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True
    ) -> str:
        """Text of token ids."""
        return self._thread.run(
            lambda: self._client.detokenize(token_ids, model=model, skip_special_tokens=skip_special_tokens)
        )


class BlockingStream:
    """As `GenerationStream`, iterated without ``async``. Leaving the loop early cancels the request."""

    def __init__(self, stream: GenerationStream, thread: LoopThread) -> None:
        self._stream = stream
        self._thread = thread

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> BlockingIterator:
        return BlockingIterator(self)

    def __next__(self) -> GenerationChunk:
        chunk = self._thread.run(lambda: anext(self._stream, None))
        if chunk is None:
            raise StopIteration
        return chunk

    @property
    def request_id(self) -> str:
        """Names the request at every router that serves it."""
        return self._stream.request_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All output tokens read so far."""
        return self._stream.token_ids

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model is shown it; empty before the first read."""
        return self._stream.prompt_token_ids

    @property
    def result(self) -> GenerationResult:
        """The whole answer; see `GenerationStream.result`."""
        return self._stream.result

    def cancel(self) -> None:
        """Stop the request at once, from any thread; one that waits for a chunk gets `RequestCancelled`."""
        self._thread.call_soon(self._stream.cancel)

    def abandon(self) -> None:
        """Cancel because the reader has gone without a word."""
        self._stream.abandon()


class BlockingIterator:
    """What a ``for`` holds and drops: leaving the loop drops it, which cancels the request."""

    def __init__(self, stream: BlockingStream) -> None:
        self._stream = stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerationChunk:
        return next(self._stream)

    def __del__(self) -> None:
        self._stream.abandon()
