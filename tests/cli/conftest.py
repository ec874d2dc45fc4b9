"""The command line called as a user calls it, and a scripted router in threads of its own."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvrelay.cli import main as cli_main
from kvrelay.codec import client_api as codec
from kvrelay.codec.errors import DETAILS_KEY, to_grpc_status
from kvrelay.core.client_types import CallAccepted, CallFinished, GenerateCall, SessionUpdate
from kvrelay.core.cluster_view import ClusterState, IndexState, ModelInfo, NodeState, QueueState
from kvrelay.core.errors import KVRelayError, UnknownRequest
from kvrelay.core.explanation import Candidate, Decision, Explanation, MeasuredRequest
from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.node_messages import NodeLoad, Role
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.core.request_report import RequestReport
from kvrelay.core.service_terms import Priority
from kvrelay.core.tokenizer_chunk import split_tokenizer, tokenizer_digest
from kvrelay.v1 import router_pb2_grpc

CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
REPORT = RequestReport("p0", "d0", 1, 7, 3, 2, 0.001, 0.1, 0.2, 4096, 2, 0.01, "memory")


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit status."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    """Run the command line in this process."""
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("KVRELAY_CONFIG", "KVRELAY_ROUTER"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kvrelay", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli_main.main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command line as a process of its own; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "KVRELAY_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **environ},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def make_bundle() -> bytes:
    """A byte-level tokenizer of 256 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    content = {
        "tokenizer": json.loads(tokenizer.to_str()),
        "chat_template": CHAT_TEMPLATE,
        "special_tokens": {"bos_token": None, "eos_token": None},
    }
    return zlib.compress(json.dumps(content).encode())


@dataclass
class FakeRouter(router_pb2_grpc.RouterServicer):  # type: ignore[misc]
    """Answers every call with `answer`, or fails it with `error`; with `hangs` it never ends one."""

    bundle: bytes = field(default_factory=make_bundle)
    has_tokenizer: bool = True
    answer: str = "Rhône, Rhein, Aare."
    error: KVRelayError | None = None
    hangs: bool = False
    calls: list[GenerateCall] = field(default_factory=list)
    cancelled: queue.Queue[int] = field(default_factory=queue.Queue)
    address: str = ""
    explanations: dict[str, Explanation] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(json.loads(zlib.decompress(self.bundle))["tokenizer"]))

    def prompt_text(self) -> str:
        """The last call's prompt."""
        return str(self.tokenizer.decode(list(self.calls[-1].request.token_ids)))

    def Session(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802 - gRPC's name
        updates: queue.Queue[SessionUpdate | None] = queue.Queue()
        threading.Thread(target=self._read, args=(requests, updates), daemon=True).start()
        while (update := updates.get()) is not None:
            yield codec.encode_session_update(update)

    def _read(self, requests: Any, updates: queue.Queue[SessionUpdate | None]) -> None:
        try:
            for pb in requests:
                ask = codec.decode_session_ask(pb)
                for stream_id, call in ask.calls:
                    assert isinstance(call, GenerateCall)
                    self.calls.append(call)
                    self._answer(stream_id, call, updates)
                for stream_id in ask.cancel:
                    self.cancelled.put(stream_id)
        except grpc.RpcError:
            pass  # the call was torn down, which ends its requests as its orderly end does
        finally:
            self.cancelled.put(0)
            updates.put(None)

    def _answer(self, stream_id: int, call: GenerateCall, updates: queue.Queue[SessionUpdate | None]) -> None:
        updates.put(SessionUpdate(accepted=[(stream_id, CallAccepted(call.request_id))]))
        if self.error:
            updates.put(SessionUpdate(failed=[(stream_id, self.error)]))
            return
        ids = self.tokenizer.encode(self.answer).ids
        logprobs: list[TokenLogprobs | None] = []
        if call.request.sampling.num_logprobs is not None:
            logprobs = [TokenLogprobs(-0.5, ((1, -0.5),)) for _ in ids]
        updates.put(SessionUpdate([stream_id], [len(ids)], ids, logprobs=logprobs))
        if not self.hangs:
            report = replace(
                REPORT, num_prompt_tokens=call.request.num_prompt_tokens, num_output_tokens=len(ids)
            )
            updates.put(SessionUpdate(finished=[(stream_id, CallFinished(FinishReason.STOP, report))]))

    def Explain(self, request: Any, context: Any) -> Any:  # noqa: N802
        request_id = codec.decode_explain(request)
        if request_id in self.explanations:
            return codec.encode_explanation(self.explanations[request_id])
        error = UnknownRequest(f"request_id {request_id!r} is not remembered", field="request_id")
        code, rich = to_grpc_status(error)
        context.set_trailing_metadata(((DETAILS_KEY, rich.SerializeToString()),))
        return context.abort(code, rich.message)

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        digest = tokenizer_digest(self.bundle) if self.has_tokenizer else ""
        return codec.encode_models((ModelInfo("tiny", 4096, 300, (), digest, 1, 1),))

    def GetTokenizer(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        for chunk in split_tokenizer(self.bundle):
            yield codec.encode_tokenizer_chunk(chunk)

    def WatchCluster(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        _, once = codec.decode_watch_cluster(request)
        yield codec.encode_cluster_state(make_state())
        if not once:
            ended = threading.Event()
            context.add_callback(ended.set)
            ended.wait()


def make_state() -> ClusterState:
    def node(name: str, role: Role, pid: int) -> NodeState:
        load = NodeLoad(
            num_running=2, num_waiting=1, num_held_blocks=10, num_cached_blocks=20, num_empty_blocks=70
        )
        return NodeState(
            NodeId(name),
            role,
            "tiny",
            "sim",
            "host-a",
            pid,
            role is Role.DECODE,
            100,
            16,
            8,
            3,
            load,
            "",
            "tcp",
            1.0,
            index_stale=role is Role.PREFILL,
        )

    return ClusterState(
        router_id="router-a",
        version="0.1.0",
        uptime_s=3661.0,
        nodes=(node("d0", Role.DECODE, 12), node("p0", Role.PREFILL, 11)),
        num_requests={"queued": 0, "decoding": 2},
        counters={"requests": 5, "failures": 0},
        mismatches=("p9 and d9: dtype: 'float32' != 'bfloat16'",),
        index=IndexState(1200, 10_000_000, 140_000, 3),
        queues=(QueueState(Priority.HIGH, 2, 1024, {"full": 3, "tenant": 0}),),
    )


def make_explanation(**measured: Any) -> Explanation:
    def candidate(name: str, role: Role, score: float, terms: dict[str, float], why: str = "") -> Candidate:
        return Candidate(NodeId(name), role, score, tuple(terms.items()), why)

    candidates = (
        candidate("p0", Role.PREFILL, 0.5, {"queue_s": 0.4, "prefill_s": 0.1}),
        candidate("p1", Role.PREFILL, 0.1, {"prefill_s": 0.1}, "it drains"),
        candidate("p2", Role.PREFILL, 0.08, {"queue_s": 0.0, "prefill_s": 0.05, "pull_s": 0.03}),
        candidate("d0", Role.DECODE, 4096.0, {"reserved_tokens": 4096.0}),
    )
    decision = Decision(NodeId("p2"), NodeId("d0"), candidates, "least-ttft", predicted_ttft_s=0.08)
    seen: dict[str, Any] = {"state": "prefilling", "num_attempts": 1, "num_prompt_tokens": 7}
    seen |= {"num_output_tokens": 0, "queue_s": 0.002, **measured}
    explained = Explanation(RequestId("r1"), "tiny", 65.0, decision, MeasuredRequest(**seen), "router-a")
    return replace(explained, predicted_queue_s=0.005, predicted_total_s=0.9)


@pytest.fixture
def fake_router() -> Iterator[FakeRouter]:
    router = FakeRouter()
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    router_pb2_grpc.add_RouterServicer_to_server(router, server)
    router.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield router
    server.stop(None).wait()


@pytest.fixture(name="make_explanation")
def make_explanation_fixture() -> Callable[..., Explanation]:
    return make_explanation


@pytest.fixture(name="make_state")
def make_state_fixture() -> Callable[[], ClusterState]:
    return make_state
