"""One of the two processes of `kv_handoff_gpu`: a store, a KV transfer service, and its orders."""

from __future__ import annotations

import asyncio
import ctypes
import os
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks.kv_handoff_timeline import TimedStore, TimedTransport, Timeline, record_frames
from kvrelay.core.block_hash import BlockHash
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.kv import KVFingerprint, KVLayout
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushDone, PushSpec, ReceiveDone, TransferEvent
from kvrelay.kv_transfer.service import KVTransferService
from kvrelay.kv_transfer.transport import KVTransport, TransportContext

KV_HEADS, HEAD_DIM, BLOCK_SIZE, DTYPE_BYTES = 8, 128, 16, 2
DIGEST = BlockHash(bytes(32))
ORDER_TIMEOUT_S, TRANSFER_TIMEOUT_S = 120.0, 60.0


class BenchFailed(Exception):
    """Ends the benchmark, with what the processes had to say."""


@dataclass(frozen=True, slots=True)
class Options:
    device: str
    layers: int
    layer_group: int
    max_tokens: int
    num_slots: int | None

    def device_of(self, role: str) -> torch.device:
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", int(role == "receiver"))

    @property
    def layout(self) -> KVLayout:
        num_blocks = -(-self.max_tokens // BLOCK_SIZE) + 64
        return KVLayout(self.layers, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, "bfloat16", DTYPE_BYTES)


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
        self.timeline = Timeline()
        self.store = TimedStore(CudaKVStore(layout, [self.cache]), self.timeline)
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
            self.transport = TimedTransport(context, self.timeline)
            return self.transport  # type: ignore[return-value]

        config = KVTransferConfig(
            transport="ucx",
            slot_bytes=slot_bytes,
            num_send_slots=self.options.num_slots,
            num_receive_slots=self.options.num_slots,
            slots_per_transfer=self.options.num_slots,
            progress_timeout_s=30.0,
        )
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

    def record(self) -> None:
        """Keep the events of what comes next."""
        if not self.timeline.events:
            record_frames(self.timeline)
        self.timeline.events = []
        self.timeline.is_on = True

    def recorded(self) -> list[tuple[float, str]]:
        self.timeline.is_on = False
        return self.timeline.events

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
        return {"scatter_s": self.store.scatters.take()}

    async def push(self, number: int, num_tokens: int, address: str) -> dict[str, Any]:
        service, transport, transfer_id = self.service, self.transport, _transfer_id(number)
        assert service is not None
        assert transport is not None
        table = self.table(number, num_tokens)
        service.open_push(PushSpec(transfer_id, address, num_tokens, DIGEST))
        await asyncio.sleep(0.02)  # until it is granted; the first one also connects
        self.store.gathers.take()
        transport.writes.take()
        started_s = time.perf_counter()
        for first in range(0, self.layout.num_layers, self.options.layer_group):
            layers = range(first, min(first + self.options.layer_group, self.layout.num_layers))
            self.store.store.mark_written(layers)
            self.timeline.add(f"push_ready: layers {layers}")
            service.push_ready(transfer_id, table, layers, range(num_tokens))
        service.finish_push(transfer_id, 0)
        outcome = await asyncio.wait_for(self.outcomes.get(), TRANSFER_TIMEOUT_S)
        handoff_s = time.perf_counter() - started_s
        self.timeline.add("PushDone is delivered")
        if not isinstance(outcome, PushDone):
            raise BenchFailed(f"the sender says {outcome}")
        return {
            "handoff_s": handoff_s,
            "gather_s": self.store.gathers.take(),
            "wire_s": transport.writes.take(),
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
