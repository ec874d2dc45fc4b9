"""A router, a prefill node on the first GPU and a decode node on the second, and how they are asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import REQUEST_TIMEOUT_S, Request
from benchmarks.local_cluster import running_service
from kvrelay.client import AsyncClient, SamplingParams

ON_DEVICE = {
    "cuda": (
        "--dtype=bfloat16",
        f"--kv-bytes={40 << 30}",
        "--max-num-seqs=256",
        "--transport=ucx",
        f"--slot-bytes={64 << 20}",
        "--num-send-slots=8",
        "--num-receive-slots=8",
        "--slots-per-transfer=8",
    ),
    "cpu": ("--dtype=float32", f"--kv-bytes={1 << 28}", "--max-num-seqs=64", "--threads=1"),
}
"""The CPU is there to try a script: its figures say nothing about a GPU's."""


@dataclass(frozen=True)
class PairSettings:
    """`folder` holds the model, or a config.json alone: then weights are random."""

    folder: Path
    max_model_len: int
    device: str = "cuda"
    prefill_tokens: int = 8192

    @property
    def vocab_size(self) -> int:
        return int(json.loads((self.folder / "config.json").read_text())["vocab_size"])

    @property
    def has_weights(self) -> bool:
        return any(self.folder.glob("*.safetensors"))


@contextmanager
def running_pair(settings: PairSettings, log_folder: Path | None = None) -> Iterator[str]:
    """The router's address, until the block ends. Raises as `running_service`."""
    node_flags = [f"--model={settings.folder}", f"--device={settings.device}", "--log-level=warning"]
    node_flags += [f"--max-model-len={settings.max_model_len}", *ON_DEVICE[settings.device]]
    if not settings.has_weights:
        node_flags.append("--random-weights")
    with ExitStack() as stack:
        router = stack.enter_context(
            running_service("router", ["--port=0", "--http-port=0"], log_folder=log_folder)
        )
        address = router.ready["grpc_address"]
        for role, gpus, tokens in (("prefill", "0,1", settings.prefill_tokens), ("decode", "1,0", 2048)):
            flags = [
                f"--router={address}",
                f"--model={settings.folder}",
                f"--max-num-batched-tokens={tokens}",
            ]
            env = {"CUDA_VISIBLE_DEVICES": gpus}  # its own first; UCX needs to see the other one too
            service = running_service(role, [*flags, *node_flags], env=env, log_folder=log_folder)
            stack.enter_context(service)
        yield address


class KvrelayTarget:
    """Asked through the client library; see `benchmarks.load.Target`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def prepare(self, request: Request) -> None:
        pass

    async def ask(self, request: Request) -> None:
        sampling = SamplingParams(max_tokens=request.num_output, ignore_eos=True)
        stream = self._client.generate(
            request.prompt, sampling=sampling, timeout_s=REQUEST_TIMEOUT_S, decode_text=False
        )
        await stream.each(lambda chunk: request.note(len(chunk.token_ids)))

    def read(self, request: Request) -> None:
        pass
