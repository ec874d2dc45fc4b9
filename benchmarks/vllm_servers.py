"""vLLM's OpenAI servers on two GPUs of one host: started, stopped for good, and asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.load import REQUEST_TIMEOUT_S, Request
from benchmarks.local_cluster import StartFailed

STOP_TIMEOUT_S = 20.0
SERVED_NAME = "m"
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What vLLM's example proxy sends with the prefill leg, so that the KV is kept for a decode leg."""


@dataclass(frozen=True)
class VLLMMode:
    """`flags` and `env` of the first and second server; `is_split`: prefill on the first, decode on the
    second, else whole requests to each in turn."""

    is_split: bool
    flags: tuple[tuple[str, ...], tuple[str, ...]]
    env: Mapping[str, str] = field(default_factory=dict)


def _nixl(role: str) -> tuple[str, ...]:
    connector = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"enable_cross_layers_blocks": "True"},
    }
    return ("--kv-transfer-config", json.dumps(connector))


SPLIT = VLLMMode(
    is_split=True,
    flags=(_nixl("kv_producer"), _nixl("kv_consumer")),
    # The newer model runner has no KV blocks that span layers.
    env={"UCX_TLS": "cuda_copy,cuda_ipc,sm,self,tcp", "VLLM_USE_V2_MODEL_RUNNER": "0"},
)
COLLOCATED = VLLMMode(is_split=False, flags=(("--max-num-batched-tokens=512",),) * 2)
BASE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class VLLMSettings:
    """`path` goes in front of the servers' PYTHONPATH; logs and compile caches lie in `work_folder`, which
    another start may use again; `more_flags` follow all others."""

    path: str
    model: Path
    max_model_len: int
    work_folder: Path
    random_weights: bool = True
    more_flags: tuple[str, ...] = ()
    python: str = sys.executable

    def command(self, port: int, flags: Sequence[str]) -> list[str]:
        load = ["--load-format=dummy"] if self.random_weights else []
        return [
            *(self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)),
            *("--served-model-name", SERVED_NAME, "--host=127.0.0.1", f"--port={port}", *load),
            *("--dtype=bfloat16", "--skip-tokenizer-init", f"--max-model-len={self.max_model_len}"),
            *("--max-num-seqs=256", "--gpu-memory-utilization=0.85", "--no-enable-prefix-caching"),
            *flags,
            *self.more_flags,
        ]


@contextmanager
def running_servers(mode: VLLMMode, settings: VLLMSettings, start_timeout_s: float) -> Iterator[list[str]]:
    """Both servers' URLs, until the block ends; then all of their processes are gone.

    Raises:
        StartFailed: one ended, or they were not both up in time; with the ends of the logs.
    """
    with ExitStack() as stack:
        ports = _free_ports(4)
        servers = []
        for index, flags in enumerate(mode.flags):
            env = {
                **BASE_ENV,
                **mode.env,
                "CUDA_VISIBLE_DEVICES": ("0,1", "1,0")[index],  # its own first; NVLink needs both in sight
                "VLLM_CACHE_ROOT": str(settings.work_folder / f"vllm-cache-{index}"),
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ports[2 + index]),
                "PYTHONPATH": os.pathsep.join([settings.path, os.environ.get("PYTHONPATH", "")]),
            }
            log_file = settings.work_folder / f"vllm-{index}.log"
            command = settings.command(ports[index], flags)
            servers.append(stack.enter_context(_process_group(command, env, log_file)))
        urls = [f"http://127.0.0.1:{port}" for port in ports[:2]]
        _wait_until_up(urls, servers, settings.work_folder, start_timeout_s)
        yield urls


@contextmanager
def _process_group(
    command: Sequence[str], env: Mapping[str, str], log_file: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with whatever it starts, all of which ends with the block."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for number, timeout_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)


def _wait_until_up(
    urls: Sequence[str], servers: Sequence[subprocess.Popen[bytes]], logs: Path, timeout_s: float
) -> None:
    deadline_s = time.monotonic() + timeout_s
    waiting = list(urls)
    while waiting:
        ended = any(server.poll() is not None for server in servers)
        if ended or time.monotonic() > deadline_s:
            why = "ended" if ended else f"was not up after {timeout_s:.0f} s"
            raise StartFailed(f"a vLLM server {why}\n{log_tails(logs)}")
        waiting = [url for url in waiting if not _is_healthy(url)]
        time.sleep(0.2)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def log_tails(folder: Path, num_characters: int = 2500) -> str:
    """The end of each log in `folder`."""
    files = sorted(folder.glob("*.log"))
    tails = (f"--- {file.name}\n{file.read_text(errors='replace')[-num_characters:]}" for file in files)
    return "\n".join(tails)


def _free_ports(count: int) -> list[int]:
    """Held together, so that they differ; another program may still take one before it is used."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class VLLMTarget:
    """See `benchmarks.load.Target`. Of a split pair it is the proxy: the prefill leg, then with what that
    returned the decode leg, whose first token is the prefill leg's once more and does not count."""

    def __init__(self, session: Any, urls: Sequence[str], *, is_split: bool) -> None:
        self._session = session
        self._urls = urls
        self._is_split = is_split
        self._turns = cycle(urls)
        self._num_asked = 0

    def prepare(self, request: Request) -> None:
        request.payload = _Exchange(request, is_split=self._is_split)

    async def ask(self, request: Request) -> None:
        exchange: _Exchange = request.payload
        self._num_asked += 1
        headers = {"Content-Type": "application/json", "X-Request-Id": f"r{self._num_asked}"}
        url, body = next(self._turns), exchange.stream_body
        if self._is_split:
            await self._prefill(exchange, headers)
            request.note(1)
            url, body = self._urls[1], exchange.decode_body()
        async with self._session.post(f"{url}/v1/completions", data=body, headers=headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {(await answer.read())[:300]!r}")
            async for piece in answer.content.iter_any():
                exchange.pieces.append((time.perf_counter(), piece))

    async def _prefill(self, exchange: _Exchange, headers: Mapping[str, str]) -> None:
        url = f"{self._urls[0]}/v1/completions"
        async with self._session.post(url, data=exchange.prefill_body, headers=headers) as answer:
            exchange.prefill_answer = await answer.read()
            if answer.status != 200:
                raise RuntimeError(f"prefill leg: {answer.status} {exchange.prefill_answer[:300]!r}")

    def read(self, request: Request) -> None:
        exchange: _Exchange = request.payload
        arrivals_s = exchange.token_times_s()
        if self._is_split and arrivals_s:
            request.notes["decode_first"] = (arrivals_s[0] - request.due_s) * 1e3
            arrivals_s = arrivals_s[1:]
        request.arrivals_s += arrivals_s


class _Exchange:
    """The bodies of one request, made before it is due, and what came, read after the last has ended."""

    def __init__(self, request: Request, *, is_split: bool) -> None:
        body = {"model": SERVED_NAME, "prompt": request.prompt, "temperature": 0, "ignore_eos": True}
        counts = {"include_usage": True, "continuous_usage_stats": True}
        streamed = {**body, "max_tokens": request.num_output, "stream": True, "stream_options": counts}
        prefill = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": REMOTE_DECODE}
        self.stream_body = json.dumps(streamed).encode()
        self.prefill_body = json.dumps(prefill).encode() if is_split else b""
        self.prefill_answer = b""
        self.pieces: list[tuple[float, bytes]] = []

    def decode_body(self) -> bytes:
        """The streamed request, told where its KV is."""
        params = json.loads(self.prefill_answer).get("kv_transfer_params")
        if not params:
            raise RuntimeError(
                f"the prefill leg returned no kv_transfer_params: {self.prefill_answer[:300]!r}"
            )
        return self.stream_body[:-1] + b', "kv_transfer_params": ' + json.dumps(params).encode() + b"}"

    def token_times_s(self) -> list[float]:
        """When each token came. Raises RuntimeError for an error in the stream."""
        times_s: list[float] = []
        rest = b""
        for at_s, piece in self.pieces:
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: {"):
                    continue
                content = json.loads(event.removeprefix(b"data: "))
                if content.get("error"):
                    raise RuntimeError(f"in the stream: {content['error']}")
                num_tokens = (content.get("usage") or {}).get("completion_tokens", 0)
                if content.get("choices"):
                    times_s += [at_s] * (num_tokens - len(times_s))
        return times_s


@asynccontextmanager
async def open_target(urls: Sequence[str], mode: VLLMMode, path: str) -> AsyncIterator[VLLMTarget]:
    """`path` is where aiohttp is looked for if it isn't installed: vLLM brings it along."""
    try:
        aiohttp: Any = import_module("aiohttp")
    except ImportError:
        sys.path.append(path)
        aiohttp = import_module("aiohttp")
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # uvicorn closes idle ones after 5 s
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20) as session:
        yield VLLMTarget(session, urls, is_split=mode.is_split)
