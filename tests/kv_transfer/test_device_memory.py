"""KV that is not in host memory: what must not touch it, what refuses it, and the store of the GPU engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvrelay.core.errors import ConfigError, TransferFailed
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import DeviceKind, FinishedCopy, KVLayout
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.kv_transfer import choose_transport, ucx
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushDone, PushFailed, PushSpec, ReceiveDone
from kvrelay.kv_transfer.memory import MemoryTransport
from kvrelay.kv_transfer.service import KVTransferService
from kvrelay.kv_transfer.transport import KVTransport, TransportContext


class DeviceStaging:
    """Says that it is on a GPU, and has no view on the host, as there."""

    device_kind = DeviceKind.CUDA
    device_index = 1

    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden
        self.num_bytes = hidden.num_bytes
        self.address = hidden.address

    def host_view(self) -> memoryview:
        raise AssertionError("memory of a GPU has no view on the host")


def device_store(kv: Any) -> Any:
    class DeviceStore(kv.NumpyStore):  # type: ignore[misc]
        device_kind = DeviceKind.CUDA

        def allocate_staging(self, num_bytes: int) -> DeviceStaging:
            return DeviceStaging(super().allocate_staging(num_bytes))

        def gather(
            self, table: Sequence[BlockId], layers: range, tokens: range, out: Any, offset: int
        ) -> FinishedCopy:
            copy: FinishedCopy = super().gather(table, layers, tokens, out.hidden, offset)
            return copy

        def scatter(
            self, table: Sequence[BlockId], layers: range, tokens: range, source: Any, offset: int
        ) -> FinishedCopy:
            copy: FinishedCopy = super().scatter(table, layers, tokens, source.hidden, offset)
            return copy

    return DeviceStore(16)


def behind_the_scenes(context: TransportContext) -> KVTransport:
    """Moves what `DeviceStaging` hides."""
    send, receive = context.send_staging, context.receive_staging
    return MemoryTransport(
        replace(
            context,
            send_staging=getattr(send, "hidden", send),
            receive_staging=getattr(receive, "hidden", receive),
        )
    )


@pytest.fixture
def transport() -> str:
    return "memory"


@pytest.mark.parametrize("sender_is_on_device", [True, False])
async def test_no_checksum_is_taken_of_memory_that_the_host_cannot_see(
    kv: Any, config: Any, sender_is_on_device: bool
) -> None:
    nodes = []
    for name, is_on_device in (("prefill", sender_is_on_device), ("decode", True)):
        store = device_store(kv) if is_on_device else kv.NumpyStore(16)
        recorder = kv.Recorder()
        service = KVTransferService(
            name, store, kv.FINGERPRINT, config, recorder, transport_factory=behind_the_scenes
        )
        await service.start()
        nodes.append(kv.Node(service, store, recorder))
    try:
        handoff = kv.Handoff(*nodes, num_tokens=100)
        handoff.start()
        pushed, received = await handoff.outcomes()
        assert isinstance(pushed, PushDone), pushed
        assert isinstance(received, ReceiveDone), received
        handoff.assert_equal()
    finally:
        for node in nodes:
            await node.service.close()


@pytest.mark.parametrize("choice", ["memory", "tcp"])
async def test_transports_for_host_memory_refuse_a_gpus(kv: Any, config: Any, choice: str) -> None:
    service = KVTransferService(
        "prefill", device_store(kv), kv.FINGERPRINT, replace(config, transport=choice), kv.Recorder()
    )
    with pytest.raises(ConfigError, match="use ucx for KV"):
        await service.start()
    await service.close()


async def test_a_gpu_without_nixl_is_told_why_nothing_moves_its_kv(
    kv: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_nixl() -> Any:
        raise ConfigError("NIXL can't be imported: no wheel")

    monkeypatch.setattr(ucx, "_import_nixl", no_nixl)
    service = KVTransferService(
        "prefill", device_store(kv), kv.FINGERPRINT, replace(config, transport="auto"), kv.Recorder()
    )
    with pytest.raises(ConfigError, match="by ucx alone, which is not to be had: NIXL can't be imported"):
        await service.start()
    await service.close()


@pytest.mark.skipif(sys.platform != "linux", reason="NIXL has wheels for Linux alone")
async def test_ucx_refuses_a_receiver_whose_kv_is_in_another_kind_of_memory(kv: Any, make_node: Any) -> None:
    class SaysGPU(choose_transport.UCXTransport):
        def endpoint(self) -> bytes:
            endpoint = super().endpoint()
            address, num_bytes, device = ucx._REGION.unpack_from(endpoint)
            assert device == 0
            return ucx._REGION.pack(address, num_bytes, 3) + endpoint[ucx._REGION.size :]

    sender = await make_node("prefill", transport="ucx")
    receiver = await make_node("decode", transport="ucx", factory=SaysGPU)
    handoff = kv.Handoff(sender, receiver, num_tokens=8)
    handoff.start()
    pushed = await sender.recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed, PushFailed)
    assert isinstance(pushed.error, TransferFailed)
    assert "KV is in the memory of a GPU, the sender's in host memory" in str(pushed.error)
    await receiver.service.cancel(handoff.transfer_id)


@pytest.mark.skipif(sys.platform != "linux", reason="NIXL has wheels for Linux alone")
async def test_the_gpu_engines_store_over_ucx(kv: Any, config: Any) -> None:
    """On CPU tensors, which take the same way through the service as a GPU's."""
    config = replace(config, transport="ucx")
    caches, services, recorders = [], [], []
    for name, block_size in (("prefill", 16), ("decode", 24)):
        layout = KVLayout(kv.NUM_LAYERS, 64, block_size, 2, 8, "float32", 4)
        caches.append(torch.rand(kv.NUM_LAYERS, 2, 64, block_size, 2, 8))
        recorders.append(kv.Recorder())
        store = CudaKVStore(layout, [caches[-1]])
        services.append(KVTransferService(name, store, kv.FINGERPRINT, config, recorders[-1]))
        await services[-1].start()
    try:
        random = np.random.default_rng(5)
        sent, received = (tuple(random.permutation(64)[:20].tolist()) for _ in range(2))
        transfer_id = kv.new_transfer_id()
        services[1].expect(ExpectedTransfer(transfer_id, received, 300, 0, kv.DIGEST))
        services[0].open_push(PushSpec(transfer_id, services[1].address, 300, kv.DIGEST))
        for layers in (range(0, 1), range(1, 4)):
            services[0].push_ready(transfer_id, sent, layers, range(300))
        services[0].finish_push(transfer_id, 1)
        assert isinstance(await recorders[1].outcome(transfer_id), ReceiveDone)
        rows = [
            cache[:, :, list(table)].flatten(2, 3)[:, :, :300]
            for cache, table in zip(caches, (sent, received), strict=True)
        ]
        assert torch.equal(*rows)
    finally:
        for service in services:
            await service.close()
