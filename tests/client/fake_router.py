"""A router that a test scripts, served by a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from kvrelay.codec import client_api as codec
from kvrelay.codec.errors import abort_with
from kvrelay.core.client_types import CallAccepted, CallFinished, GenerateCall, SessionUpdate
from kvrelay.core.cluster_view import ClusterState, ModelInfo
from kvrelay.core.errors import KVRelayError, UnknownNode, UnknownRequest
from kvrelay.core.explanation import Explanation
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.core.request_report import RequestReport
from kvrelay.core.tokenizer_chunk import split_tokenizer
from kvrelay.v1 import router_pb2, router_pb2_grpc

PATIENCE_S = 30.0
"""How long a test waits for what must happen; a passing test never waits it out."""


def answer_token(prompt: Sequence[int], index: int) -> int:
    """What every fake router answers at an output index: a function of prompt and index alone."""
    return (sum(prompt) * 31 + index * 7) % 251


@dataclass(eq=False)
class ScriptedCall:
    """One call at a fake router, to be answered by a script."""

    call: GenerateCall
    stream_id: int
    send: Callable[[SessionUpdate], Awaitable[None]]
    raw: Callable[..., Awaitable[None]]
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    satisfied: asyncio.Event = field(default_factory=asyncio.Event)
    num_sent: int = 0

    async def wait_cancelled(self) -> None:
        """Until the client has cancelled the call, or its session has ended."""
        async with asyncio.timeout(PATIENCE_S):
            await self.cancelled.wait()

    async def wait_satisfied(self) -> None:
        """Until the client has said that it has all it wants."""
        async with asyncio.timeout(PATIENCE_S):
            await self.satisfied.wait()

    async def tokens(self, *token_ids: int, logprobs: list[TokenLogprobs | None] | None = None) -> None:
        self.num_sent += len(token_ids)
        await self.send(
            SessionUpdate([self.stream_id], [len(token_ids)], list(token_ids), logprobs=logprobs or [])
        )

    async def next_tokens(self, num_tokens: int) -> None:
        """Answer the next indices with `answer_token`."""
        request = self.call.request
        first = request.num_output_tokens + self.num_sent
        prompt = request.token_ids[: request.num_prompt_tokens]
        await self.tokens(*(answer_token(prompt, first + step) for step in range(num_tokens)))

    async def finish(self, reason: FinishReason = FinishReason.LENGTH, num_tokens: int | None = None) -> None:
        total = self.call.request.num_output_tokens + self.num_sent if num_tokens is None else num_tokens
        report = RequestReport(
            "p0",
            "d0",
            1,
            self.call.request.num_prompt_tokens,
            total,
            0,
            0.0,
            0.1,
            0.2,
            4096,
            2,
            0.01,
            "memory",
        )
        await self.send(SessionUpdate(finished=[(self.stream_id, CallFinished(reason, report))]))

    async def fail(self, error: KVRelayError) -> None:
        await self.send(SessionUpdate(failed=[(self.stream_id, error)]))


Script = Callable[[ScriptedCall], Awaitable[None]]


async def answer_all(call: ScriptedCall) -> None:
    """The default script: `max_tokens` tokens, one message each."""
    for _ in range(call.call.request.num_remaining_tokens):
        await call.next_tokens(1)
    await call.finish()


class FakeRouter(router_pb2_grpc.RouterServicer):  # type: ignore[misc]
    """Answers each call by `script`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.script: Script = answer_all
        self.calls: list[ScriptedCall] = []
        self.arrived = asyncio.Condition()
        self.num_sessions = 0
        self.num_open_sessions = 0
        self.models: tuple[ModelInfo, ...] = ()
        self.bundles: dict[str, bytes] = {}
        self.num_tokenizer_requests = 0
        self.num_model_requests = 0
        self.live_ids: set[str] = set()
        self.cancelled_ids: list[str] = []
        self.explanations: dict[str, Explanation] = {}
        self.node_ids: list[str] = []
        self.drained_ids: list[str] = []
        self.states: list[ClusterState] = [ClusterState(router_id="fake")]
        self.unary_errors: list[KVRelayError] = []
        self.address = ""
        self.server: Any = None
        self._stopping: asyncio.Task[None] | None = None

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        router_pb2_grpc.add_RouterServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()
        self._stopping = None

    async def kill(self) -> None:
        """Stop at once. A script may call it, though that cancels the script; a second call waits for the
        first."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self.server.stop(None))
        await asyncio.shield(self._stopping)

    async def wait_calls(self, number: int) -> None:
        """Until that many calls have arrived in all."""
        async with asyncio.timeout(PATIENCE_S), self.arrived:
            await self.arrived.wait_for(lambda: len(self.calls) >= number)

    async def wait_no_sessions(self) -> None:
        async with asyncio.timeout(PATIENCE_S), self.arrived:
            await self.arrived.wait_for(lambda: self.num_open_sessions == 0)

    async def _changed(self) -> None:
        async with self.arrived:
            self.arrived.notify_all()

    async def Session(self, requests: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        self.num_sessions += 1
        self.num_open_sessions += 1
        streams: dict[int, ScriptedCall] = {}
        writing = asyncio.Lock()

        async def send(update: SessionUpdate) -> None:
            async with writing:
                await context.write(codec.encode_session_update(update))

        async def raw(**columns: Any) -> None:
            await context.write(router_pb2.SessionResponse(**columns))

        try:
            async with asyncio.TaskGroup() as scripts:
                async for pb in requests:
                    ask = codec.decode_session_ask(pb)
                    for stream_id, call in ask.calls:
                        if isinstance(call, KVRelayError):
                            await send(SessionUpdate(failed=[(stream_id, call)]))
                            continue
                        scripted = streams[stream_id] = ScriptedCall(call, stream_id, send, raw)
                        await send(
                            SessionUpdate(accepted=[(stream_id, CallAccepted(call.request_id or "x"))])
                        )
                        self.calls.append(scripted)
                        scripts.create_task(self.script(scripted))  # type: ignore[arg-type]
                    for stream_id in ask.cancel:
                        streams[stream_id].cancelled.set()
                    for stream_id in ask.finish:
                        streams[stream_id].satisfied.set()
                    await self._changed()
        finally:
            for scripted in streams.values():
                scripted.cancelled.set()
            self.num_open_sessions -= 1
            await asyncio.shield(self._changed())

    async def _refuse(self, context: Any) -> None:
        if self.unary_errors:
            await abort_with(context, self.unary_errors.pop(0))

    async def Cancel(self, request: Any, context: Any) -> router_pb2.CancelResponse:  # noqa: N802
        request_id = codec.decode_cancel(request)
        if request_id not in self.live_ids:
            await abort_with(context, UnknownRequest(f"no {request_id}", field="request_id"))
        self.cancelled_ids.append(request_id)
        return router_pb2.CancelResponse()

    async def DrainNode(self, request: Any, context: Any) -> router_pb2.DrainNodeResponse:  # noqa: N802
        node_id = codec.decode_drain_node(request)
        if node_id not in self.node_ids:
            await abort_with(context, UnknownNode(f"no {node_id}", field="node_id"))
        self.drained_ids.append(node_id)
        return router_pb2.DrainNodeResponse()

    async def Explain(self, request: Any, context: Any) -> router_pb2.ExplainResponse:  # noqa: N802
        await self._refuse(context)
        request_id = codec.decode_explain(request)
        if request_id not in self.explanations:
            await abort_with(context, UnknownRequest(f"no {request_id}, of 128", field="request_id"))
        return codec.encode_explanation(self.explanations[request_id])

    async def ListModels(self, request: Any, context: Any) -> router_pb2.ListModelsResponse:  # noqa: N802
        self.num_model_requests += 1
        await self._refuse(context)
        return codec.encode_models(self.models)

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.num_tokenizer_requests += 1
        for chunk in split_tokenizer(self.bundles[codec.decode_get_tokenizer(request)]):
            yield codec.encode_tokenizer_chunk(chunk)

    async def WatchCluster(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await self._refuse(context)
        _, once = codec.decode_watch_cluster(request)
        for state in self.states[:1] if once else self.states:
            yield codec.encode_cluster_state(state)
        if not once:
            await asyncio.Event().wait()
