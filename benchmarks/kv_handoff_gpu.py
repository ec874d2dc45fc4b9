"""A handoff's KV between two GPUs of one host, through the KV transfer service.

    python -m benchmarks.kv_handoff_gpu [--json] [--tokens 1024 4096 8192 32768] [--slot-mib 16 64 256]

Two processes, each seeing both GPUs: the sender's cache on GPU 0, the receiver's on GPU 1, both of the shape
of Llama-3.1-8B with random content in shuffled blocks. For each staging slot size and prompt length:

* `handoff`: from the first `push_ready` (all layers, in groups, link open and offer granted) until the
  receiver's acknowledgement has come back: p50 of the repeats, and the GB/s that makes.
* its parts, summed over the messages: `gather` and `scatter` (which overlap with the wire), and `wire`, the
  time in which at least one write was under way.
* `exact`: whether every layer's checksum, taken on each GPU by torch's own indexing, is the same on both.

Beside it: the same blocks by NIXL, one descriptor a block, layer and K or V, from cache to cache; and what a
plain copy from GPU 0 to GPU 1 gives. `--device cpu --layers 2` tries the script itself without a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.kv import KVFingerprint, KVLayout, StagingMemory
from kvrelay.engine.cuda.kv_store import CudaKVStore, CudaStaging
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushDone, PushSpec, ReceiveDone, TransferEvent
from kvrelay.kv_transfer.service import KVTransferService
from kvrelay.kv_transfer.transport import KVTransport, TransportContext, TransportEvent, WriteCompleted
from kvrelay.kv_transfer.ucx import UCXTransport

KV_HEADS, HEAD_DIM, BLOCK_SIZE, DTYPE_BYTES = 8, 128, 16, 2
DIGEST = BlockHash(bytes(32))
START_TIMEOUT_S, ORDER_TIMEOUT_S, TRANSFER_TIMEOUT_S = 240.0, 120.0, 60.0
NVLINK_FLOOR_GB_PER_S = 50.0


class BenchFailed(Exception):
    """Ends the benchmark, with what the processes had to say."""


@dataclass(frozen=True, slots=True)
class Options:
    device: str
    layers: int
    layer_group: int
    max_tokens: int

    def device_of(self, role: str) -> torch.device:
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", int(role == "receiver"))

    @property
    def layout(self) -> KVLayout:
        num_blocks = -(-self.max_tokens // BLOCK_SIZE) + 64
        return KVLayout(self.layers, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, "bfloat16", DTYPE_BYTES)


class TimedStore:
    """Adds up the seconds of gathers and scatters."""

    def __init__(self, store: CudaKVStore) -> None:
        self.store = store
        self.layout = store.layout
        self.gather_s = self.scatter_s = 0.0

    def allocate_staging(self, num_bytes: int) -> CudaStaging:
        return self.store.allocate_staging(num_bytes)

    def gather(
        self, table: Sequence[BlockId], layers: range, tokens: range, out: StagingMemory, offset: int
    ) -> int:
        started_s = time.perf_counter()
        num_bytes = self.store.gather(table, layers, tokens, out, offset)
        self.gather_s += time.perf_counter() - started_s
        return num_bytes

    def scatter(
        self, table: Sequence[BlockId], layers: range, tokens: range, source: StagingMemory, offset: int
    ) -> int:
        started_s = time.perf_counter()
        num_bytes = self.store.scatter(table, layers, tokens, source, offset)
        self.scatter_s += time.perf_counter() - started_s
        return num_bytes


class TimedTransport:
    """UCX, and the seconds in which at least one write was under way."""

    def __init__(self, context: TransportContext) -> None:
        self.inner = UCXTransport(context)
        self.wire_s = 0.0
        self._num_writing = 0
        self._since_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def post_write(self, link_id: int, local_offset: int, remote_offset: int, num_bytes: int) -> int:
        if self._num_writing == 0:
            self._since_s = time.perf_counter()
        self._num_writing += 1
        return self.inner.post_write(link_id, local_offset, remote_offset, num_bytes)

    def poll(self) -> Sequence[TransportEvent]:
        events = self.inner.poll()
        num_completed = sum(isinstance(event, WriteCompleted) for event in events)
        self._num_writing -= num_completed
        if num_completed and self._num_writing == 0:
            self.wire_s += time.perf_counter() - self._since_s
        return events


class Child:
    """One side, in its own process. Its orders are its public methods."""

    def __init__(self, role: str, pipe: Connection, options: Options) -> None:
        self.role = role
        self.pipe = pipe
        self.options = options
        self.layout = options.layout
        self.device = options.device_of(role)
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda:
            if torch.cuda.device_count() < 2:
                raise BenchFailed(f"{torch.cuda.device_count()} GPUs are visible, this needs two")
            torch.cuda.set_device(self.device)
        layout = self.layout
        shape = (layout.num_layers, 2, layout.num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.cache = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
        if role == "sender":
            self.cache.view(torch.int64).random_()
        self.store = TimedStore(CudaKVStore(layout, self.cache))
        self.transport: TimedTransport | None = None
        self.service: KVTransferService | None = None
        self.outcomes: asyncio.Queue[TransferEvent] = asyncio.Queue()
        self.agent: Any = None

    def describe(self) -> dict[str, Any]:
        found = {"torch": torch.__version__, "copier": self.store.store.copier_name}
        if self.is_cuda:
            found["gpu"] = torch.cuda.get_device_name(self.device)
            found["peer_access"] = str(torch.cuda.can_device_access_peer(0, 1))
        return found

    async def open(self, slot_bytes: int) -> dict[str, Any]:
        def factory(context: TransportContext) -> KVTransport:
            self.transport = TimedTransport(context)
            return self.transport  # type: ignore[return-value]

        config = KVTransferConfig(transport="ucx", slot_bytes=slot_bytes, progress_timeout_s=30.0)
        fingerprint = KVFingerprint("bench", "bfloat16", self.layout.num_layers, KV_HEADS, HEAD_DIM, "")
        self.service = KVTransferService(
            self.role, self.store, fingerprint, config, self.outcomes.put_nowait, transport_factory=factory
        )
        await asyncio.wait_for(self.service.start(), 60)
        assert self.transport is not None
        return {"address": self.service.address, "lanes": self.transport.inner.lanes}

    def link_gb_per_s(self) -> list[float]:
        """What the start-up probe of each link found."""
        assert self.service is not None
        return [rate / 1e9 for rate in self.service.link_bytes_per_s().values()]

    async def close(self) -> None:
        assert self.service is not None
        await asyncio.wait_for(self.service.close(), 60)
        self.service = self.transport = None

    def table(self, number: int, num_tokens: int) -> tuple[BlockId, ...]:
        """Shuffled, another one for each transfer and side."""
        seed = [number, self.role == "sender"]
        order = np.random.default_rng(seed).permutation(self.layout.num_blocks)
        return tuple(order[: -(-num_tokens // BLOCK_SIZE)].tolist())

    def clear(self) -> None:
        self.cache.zero_()
        self.synchronize()

    def checksums(self, number: int, num_tokens: int) -> list[int]:
        """One a layer, over all its 64-bit words, each weighed by its place."""
        blocks = torch.tensor(self.table(number, num_tokens), device=self.device)
        sums = []
        for layer in self.cache:
            rows = layer[:, blocks].reshape(2, -1, KV_HEADS * HEAD_DIM)[:, :num_tokens].contiguous()
            words = rows.view(torch.int64).reshape(-1)
            weights = torch.arange(len(words), device=self.device).mul_(2).add_(1)
            sums.append(int(weights.mul_(words).sum()))
        return sums

    def expect(self, number: int, num_tokens: int) -> None:
        assert self.service is not None
        self.store.store.mark_freed()
        table = self.table(number, num_tokens)
        self.service.expect(ExpectedTransfer(_transfer_id(number), table, num_tokens, 0, DIGEST))

    async def received(self) -> dict[str, Any]:
        outcome = await asyncio.wait_for(self.outcomes.get(), TRANSFER_TIMEOUT_S)
        if not isinstance(outcome, ReceiveDone):
            raise BenchFailed(f"the receiver says {outcome}")
        scatter_s, self.store.scatter_s = self.store.scatter_s, 0.0
        return {"scatter_s": scatter_s}

    async def push(self, number: int, num_tokens: int, address: str) -> dict[str, Any]:
        service, transport, transfer_id = self.service, self.transport, _transfer_id(number)
        assert service is not None
        assert transport is not None
        table = self.table(number, num_tokens)
        service.open_push(PushSpec(transfer_id, address, num_tokens, DIGEST))
        await asyncio.sleep(0.02)  # until it is granted; the first one also connects
        self.store.gather_s = transport.wire_s = 0.0
        started_s = time.perf_counter()
        for first in range(0, self.layout.num_layers, self.options.layer_group):
            layers = range(first, min(first + self.options.layer_group, self.layout.num_layers))
            self.store.store.mark_written(layers)
            service.push_ready(transfer_id, table, layers, range(num_tokens))
        service.finish_push(transfer_id, 0)
        outcome = await asyncio.wait_for(self.outcomes.get(), TRANSFER_TIMEOUT_S)
        handoff_s = time.perf_counter() - started_s
        if not isinstance(outcome, PushDone):
            raise BenchFailed(f"the sender says {outcome}")
        return {
            "handoff_s": handoff_s,
            "gather_s": self.store.gather_s,
            "wire_s": transport.wire_s,
            "num_bytes": outcome.stats.num_bytes,
            "num_messages": outcome.stats.num_messages,
        }

    def open_agent(self) -> None:
        """A NIXL agent that knows the whole cache, for the block-wise way."""
        import nixl_cu13 as nixl

        os.environ.setdefault("UCX_TLS", ("cuda_copy,cuda_ipc," if self.is_cuda else "") + "sm,self,tcp")
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent = nixl.nixl_agent(f"blocks-{self.role}-{os.getpid()}", config)
        kind = "VRAM" if self.is_cuda else "DRAM"
        extent = (self.cache.data_ptr(), self.cache.nbytes, self.device.index or 0, "")
        self.agent.register_memory([extent], kind)

    def block_endpoint(self) -> bytes:
        return bytes(self.agent.get_agent_metadata())

    def block_list(self, number: int, num_tokens: int) -> Any:
        """``[blocks * layers * 2, 3]``: address, bytes, device of each piece, layer by layer."""
        block_bytes = BLOCK_SIZE * KV_HEADS * HEAD_DIM * DTYPE_BYTES
        planes = np.arange(2 * self.layout.num_layers, dtype=np.uint64)[:, None]
        blocks = np.asarray(self.table(number, num_tokens), dtype=np.uint64)[None, :]
        starts = (planes * np.uint64(self.layout.num_blocks) + blocks).reshape(-1) * np.uint64(block_bytes)
        pieces = np.empty((len(starts), 3), dtype=np.uint64)
        pieces[:, 0] = starts + np.uint64(self.cache.data_ptr())
        pieces[:, 1] = block_bytes
        pieces[:, 2] = self.device.index or 0
        return pieces

    def progress(self) -> None:
        """Help the sender's writes along until the next order comes."""
        deadline_s = time.monotonic() + ORDER_TIMEOUT_S
        while not self.pipe.poll() and time.monotonic() < deadline_s:
            self.agent.get_new_notifs()

    def nothing(self) -> None:
        return

    def push_blocks(self, number: int, num_tokens: int, endpoint: bytes, theirs: Any, n: int) -> Any:
        agent, kind = self.agent, "VRAM" if self.is_cuda else "DRAM"
        peer = agent.add_remote_agent(endpoint)
        mine = self.block_list(number, num_tokens)
        rows = []
        for _ in range(n):
            started_s = time.perf_counter()
            handle = agent.initialize_xfer(
                "WRITE", agent.get_xfer_descs(mine, kind), agent.get_xfer_descs(theirs, kind), peer
            )
            posted_s = time.perf_counter()
            state = agent.transfer(handle)
            while state == "PROC" and time.perf_counter() - posted_s < TRANSFER_TIMEOUT_S:
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise BenchFailed(f"the block-wise write ended as {state}")
            rows.append((posted_s - started_s, time.perf_counter() - posted_s))
            handle.release()
        init_s, wire_s = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        return {
            "num_descriptors": len(mine),
            "num_bytes": int(mine[:, 1].sum()),
            "init_s": init_s,
            "wire_s": wire_s,
        }

    def ceiling_gb_per_s(self) -> float:
        """A plain copy of 1 GiB from GPU 0 to GPU 1."""
        source = torch.zeros(1 << 30, dtype=torch.uint8, device=self.device)
        target = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda:1" if self.is_cuda else "cpu")
        times = []
        for _ in range(8):
            self.synchronize()
            started_s = time.perf_counter()
            target.copy_(source)
            self.synchronize()
            times.append(time.perf_counter() - started_s)
        return (1 << 30) / min(times) / 1e9

    def synchronize(self) -> None:
        if self.is_cuda:
            for index in range(2):
                torch.cuda.synchronize(index)


def _transfer_id(number: int) -> TransferId:
    return TransferId(1, AttemptId(number))


def child_process(role: str, pipe: Connection, log_path: str, options: Options) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.setdefault("UCX_PROTO_INFO", "y")
    os.environ.setdefault("UCX_LOG_FILE", f"{log_path}.ucx")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    try:
        asyncio.run(obey(role, pipe, options))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)  # UCX's log
    os._exit(0)  # past the destructors of UCX, some of which crash


async def obey(role: str, pipe: Connection, options: Options) -> None:
    loop = asyncio.get_running_loop()
    child: Child | None = None
    while True:
        try:
            name, arguments = await loop.run_in_executor(None, pipe.recv)
        except EOFError:
            return
        if name == "quit":
            return
        try:
            if name == "start":
                child = Child(role, pipe, options)
                answer = child.describe()
            else:
                answer = getattr(child, name)(*arguments)
                if asyncio.iscoroutine(answer):
                    answer = await answer
            pipe.send(("ok", answer))
        except Exception as error:
            traceback.print_exc()
            pipe.send(("error", f"{role}, {name}{arguments if name != 'push_blocks' else ''}: {error!r}"))


class Process:
    """The parent's handle of one child."""

    def __init__(self, role: str, folder: Path, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self.role = role
        self.log_path = folder / f"{role}.log"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=child_process, args=(role, theirs, str(self.log_path), options), daemon=True
        )
        self.process.start()
        theirs.close()

    def order(self, name: str, *arguments: Any) -> None:
        self.pipe.send((name, arguments))

    def answer(self, timeout_s: float = ORDER_TIMEOUT_S) -> Any:
        try:
            if not self.pipe.poll(timeout_s):
                raise BenchFailed(f"the {self.role} did not answer within {timeout_s:.0f} s")
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise BenchFailed(f"the {self.role} died, exit code {self.process.exitcode}") from None
        if kind == "error":
            raise BenchFailed(answer)
        return answer

    def ask(self, name: str, *arguments: Any) -> Any:
        self.order(name, *arguments)
        return self.answer()

    def end(self) -> None:
        with suppress(OSError):
            self.order("quit")
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)

    def log_tail(self) -> str:
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return f"---- the {self.role}'s output, its end ----\n" + "\n".join(text.splitlines()[-60:])

    def lanes(self) -> list[str]:
        """What UCX says of the way that its writes take."""
        path = Path(f"{self.log_path}.ucx")
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        found: list[str] = []
        for index, line in enumerate(lines):
            if "ucp_put" in line:
                for row in lines[index : index + 10]:
                    cells = row.partition("]   ")[2].strip() or row.strip()
                    if (
                        cells.startswith("+")
                        and len(found)
                        and found[-1].startswith("| ")
                        and ".." in found[-1]
                    ):
                        break
                    if cells.startswith("|") and cells not in found:
                        found.append(cells)
        return found


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        child_options = Options(options.device, options.layers, options.layer_group, max(options.tokens))
        self.receiver = Process("receiver", folder, child_options)
        self.sender = Process("sender", folder, child_options)
        self.number = 0
        self.report: dict[str, Any] = {"benchmark": "kv_handoff_gpu", "device": options.device, "rows": []}
        self.faults: list[str] = []

    def run(self) -> None:
        self.start()
        for slot_mib in self.options.slot_mib:
            self.with_slots(slot_mib)
        for name, part in (("block_wise", self.block_wise), ("ceiling", self.ceiling)):
            try:
                part()
            except BenchFailed as error:
                self.fault(f"{name}: {error}")

    def start(self) -> None:
        for side in (self.receiver, self.sender):
            side.order("start")
        for side in (self.receiver, self.sender):
            found = side.answer(START_TIMEOUT_S)
            self.report[side.role] = found
            self.say(f"{side.role}: {', '.join(f'{key} {value}' for key, value in found.items())}")

    def with_slots(self, slot_mib: int) -> None:
        opened = [side.ask("open", slot_mib << 20) for side in (self.receiver, self.sender)]
        address = opened[0]["address"]
        self.say(f"\nslots of {slot_mib} MiB, {opened[1]['lanes']}")
        for num_tokens in self.options.tokens:
            row = {"slot_mib": slot_mib, **self.measure(num_tokens, address)}
            self.report["rows"].append(row)
            self.say(
                f"{num_tokens:6d} tokens {row['mb']:7.1f} MB | handoff p50 {row['handoff_ms']:8.3f} ms"
                f" (best {row['handoff_best_ms']:.3f}) {row['gb_per_s']:6.1f} GB/s"
                f" | gather {row['gather_ms']:.3f} wire {row['wire_ms']:.3f}"
                f" ({row['wire_gb_per_s']:.1f} GB/s) scatter {row['scatter_ms']:.3f} ms"
                f" | {row['num_messages']} messages | exact {row['exact']}"
            )
            if not row["exact"]:
                self.fault(f"the KV of {num_tokens} tokens arrived wrong: {row['differences']}")
        probed = self.sender.ask("link_gb_per_s")
        self.report.setdefault("probed_gb_per_s", []).extend(probed)
        self.say(f"the link's start-up probe found {', '.join(f'{rate:.1f}' for rate in probed)} GB/s")
        for side in (self.sender, self.receiver):
            side.ask("close")

    def transfer(self, num_tokens: int, address: str) -> dict[str, Any]:
        self.number += 1
        self.receiver.ask("expect", self.number, num_tokens)
        pushed = self.sender.ask("push", self.number, num_tokens, address)
        return {**pushed, **self.receiver.ask("received")}

    def measure(self, num_tokens: int, address: str) -> dict[str, Any]:
        for _ in range(3):
            self.transfer(num_tokens, address)
        runs = [self.transfer(num_tokens, address) for _ in range(self.options.repeats)]
        self.receiver.ask("clear")
        self.transfer(num_tokens, address)
        differences = self.compare(num_tokens)
        p50 = {
            name: statistics.median(run[name] for run in runs)
            for name in ("handoff_s", "gather_s", "wire_s", "scatter_s")
        }
        num_bytes = runs[0]["num_bytes"]
        return {
            "num_tokens": num_tokens,
            "mb": num_bytes / 1e6,
            "num_messages": runs[0]["num_messages"],
            "gb_per_s": num_bytes / p50["handoff_s"] / 1e9,
            "wire_gb_per_s": num_bytes / p50["wire_s"] / 1e9,
            "handoff_best_ms": min(run["handoff_s"] for run in runs) * 1e3,
            **{name.replace("_s", "_ms"): value * 1e3 for name, value in p50.items()},
            "exact": not differences,
            "differences": differences,
        }

    def compare(self, num_tokens: int) -> str:
        """Which layers of the latest transfer differ, empty when none does."""
        sent, received = (
            side.ask("checksums", self.number, num_tokens) for side in (self.sender, self.receiver)
        )
        if len(set(sent)) < len(sent):
            return "the sender's layers are not random"
        wrong = [
            layer for layer, (mine, theirs) in enumerate(zip(sent, received, strict=True)) if mine != theirs
        ]
        return f"layers {wrong}" if wrong else ""

    def block_wise(self) -> None:
        num_tokens = min(4096, max(self.options.tokens))
        self.number += 1
        for side in (self.receiver, self.sender):
            side.ask("open_agent")
        self.receiver.ask("clear")
        endpoint = self.receiver.ask("block_endpoint")
        theirs = self.receiver.ask("block_list", self.number, num_tokens)
        self.receiver.order("progress")
        row = self.sender.ask("push_blocks", self.number, num_tokens, endpoint, theirs, 6)
        self.receiver.order("nothing")
        for _ in range(2):
            self.receiver.answer()
        seconds = row["init_s"] + row["wire_s"]
        row["differences"] = self.compare(num_tokens)
        row["gb_per_s"] = row["num_bytes"] / seconds / 1e9
        row["wire_gb_per_s"] = row["num_bytes"] / row["wire_s"] / 1e9
        self.report["block_wise"] = row
        self.say(
            f"\nblock-wise, {num_tokens} tokens as {row['num_descriptors']} descriptors:"
            f" {seconds * 1e3:.2f} ms {row['gb_per_s']:.1f} GB/s"
            f" | making the request {row['init_s'] * 1e3:.2f} wire {row['wire_s'] * 1e3:.2f} ms"
            f" ({row['wire_gb_per_s']:.1f} GB/s)"
            f" | exact {not row['differences']}"
        )
        if row["differences"]:
            self.fault(f"block-wise KV arrived wrong: {row['differences']}")

    def ceiling(self) -> None:
        self.report["ceiling_gb_per_s"] = found = self.sender.ask("ceiling_gb_per_s")
        self.say(f"plain copy of 1 GiB from GPU 0 to GPU 1: {found:.1f} GB/s")

    def conclude(self) -> None:
        """Once the children are gone, so that UCX's log is complete."""
        self.report["ucx_lanes"] = lanes = self.sender.lanes()
        self.say("\nUCX's own word on the sender's writes:\n  " + "\n  ".join(lanes or ["none to be had"]))
        rates = [row["wire_gb_per_s"] for row in self.report["rows"]]
        if self.options.device == "cuda" and rates and max(rates) < NVLINK_FLOOR_GB_PER_S:
            self.fault(f"no NVLink: the wire gave {max(rates):.1f} GB/s at best; see the lanes above")
        self.report["faults"] = self.faults

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self.options.json else sys.stdout, flush=True)

    def logs(self) -> str:
        return "\n".join(side.log_tail() for side in (self.sender, self.receiver))


def give_up(bench: Bench, deadline_s: float) -> None:
    """From a timer: nothing that hangs may keep the GPUs."""
    print(f"FAULT: not done after {deadline_s:.0f} s, killed\n{bench.logs()}", file=sys.stderr, flush=True)
    for side in (bench.sender, bench.receiver):
        side.process.kill()
    os._exit(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; the table goes to stderr")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192, 32768])
    parser.add_argument("--slot-mib", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--layer-group", type=int, default=8)
    parser.add_argument("--deadline-s", type=float, default=420.0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kv_handoff_gpu."))
    bench = Bench(options, folder)
    timer = threading.Timer(options.deadline_s, give_up, (bench, options.deadline_s))
    timer.daemon = True
    timer.start()
    try:
        bench.run()
    except BenchFailed as error:
        bench.fault(str(error))
    finally:
        bench.sender.end()
        bench.receiver.end()
    bench.conclude()
    timer.cancel()
    if bench.faults:
        print(bench.logs(), file=sys.stderr, flush=True)
        if shutil.which("nvidia-smi"):
            subprocess.run(["nvidia-smi", "topo", "-m"], stdout=sys.stderr, timeout=30, check=False)
        print(f"the whole logs are in {folder}", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps(bench.report))
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
