"""Transport over UCX through NIXL: NVLink, InfiniBand or RoCE, shared memory, TCP, whichever UCX chooses.

What NIXL 1.5 does, and this file relies on or works around:

* A write through shared memory (CMA) happens inside `transfer`, also when the target is stopped. Over
  UCX's own TCP lanes, and while a connection is set up, the target must be polled too (see `Pump`).
* Nothing ever times out: deadlines are the caller's. A killed peer shows at the next post or check.
* Only the sender loads its peer's metadata, which it got from a node that it chose to dial: a receiver
  never parses what a stranger sends.
* With the progress thread off, an idle agent costs no CPU.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from struct import Struct
from types import ModuleType
from typing import Any, Final

from kvrelay.core.errors import ConfigError, TransferFailed
from kvrelay.core.kv import DeviceKind, StagingMemory
from kvrelay.kv_transfer.link_probe import PROBE_BYTES, LinkProbe
from kvrelay.kv_transfer.transport import (
    SCRATCH_BYTES,
    LinkTried,
    PeerConnected,
    PeerLost,
    TransportContext,
    TransportEvent,
    WriteCompleted,
)

_REGION: Final = Struct(">QQB")
_TRIAL_BYTES: Final = 8
_INFINIBAND: Final = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class _Region:
    """Remote staging memory: `kind` is NIXL's name, ``DRAM`` or ``VRAM``."""

    address: int
    num_bytes: int
    device_index: int
    kind: str


@dataclass(slots=True)
class _Peer:
    agent_name: bytes
    region: _Region
    probe: LinkProbe | None = None
    is_open: bool = False
    writes: dict[int, Any] = field(default_factory=dict)


class UCXTransport:
    """See the module's text. Creation takes about half a second.

    Raises:
        ConfigError: NIXL is missing or does not work here.
    """

    name = "ucx"
    late_writes = True
    polls = True

    def __init__(self, context: TransportContext) -> None:
        self._context = context
        device_kind = context.receive_staging.device_kind
        with _environment(_settings(device_kind, context.ucx_tls)):
            self.lanes = f"UCX_TLS={os.environ.get('UCX_TLS', 'all')}"
            nixl = _import_nixl()
            self._errors = _error_types(nixl)
            try:
                self._agent: Any = _new_agent(nixl, context.name)
                self._registered = [
                    self._agent.register_memory([(*_extent(staging), "")], _nixl_kind(staging))
                    for staging in (context.send_staging, context.receive_staging)
                ]
            except self._errors as error:
                raise ConfigError(f"NIXL does not work here: {error}") from error
        self._peers: dict[int, _Peer] = {}
        self._events: list[TransportEvent] = []
        self._write_ids = count(1)
        self._undead: list[Any] = []

    @property
    def has_writes_in_flight(self) -> bool:
        return any(peer.writes for peer in self._peers.values())

    def endpoint(self) -> bytes:
        staging = self._context.receive_staging
        address, num_bytes, device_index = _extent(staging)
        is_cuda = staging.device_kind is DeviceKind.CUDA
        region = _REGION.pack(address, num_bytes, device_index * 2 + is_cuda)
        return region + bytes(self._agent.get_agent_metadata())

    def admit(self, link_id: int) -> bytes:
        return b""

    def connect(self, link_id: int, host: str, endpoint: bytes, ticket: bytes) -> None:
        if len(endpoint) <= _REGION.size:
            self._lose(link_id, "its endpoint is malformed")
            return
        address, num_bytes, device = _REGION.unpack_from(endpoint)
        region = _Region(address, num_bytes, device // 2, "VRAM" if device % 2 else "DRAM")
        if region.kind != _nixl_kind(self._context.send_staging):
            self._refuse(link_id, region)
            return
        try:
            agent_name = self._agent.add_remote_agent(endpoint[_REGION.size :])
        except self._errors as error:
            self._lose(link_id, f"its endpoint was not accepted: {error}")
            return
        self._peers[link_id] = _Peer(agent_name, region)
        # UCX connects at the first write, with the target's help: do that now, into the scratch bytes.
        self._write_scratch(link_id, region, _TRIAL_BYTES)

    def _write_scratch(self, link_id: int, region: _Region, num_bytes: int) -> None:
        local_offset = self._context.send_staging.num_bytes - SCRATCH_BYTES
        self.post_write(link_id, local_offset, region.num_bytes - SCRATCH_BYTES, num_bytes)

    def post_write(self, link_id: int, local_offset: int, remote_offset: int, num_bytes: int) -> int:
        write_id = next(self._write_ids)
        peer = self._peers.get(link_id)
        if peer is None:
            return write_id  # `PeerLost` is on its way
        staging = self._context.send_staging
        local = (staging.address + local_offset, num_bytes, staging.device_index)
        remote = (peer.region.address + remote_offset, num_bytes, peer.region.device_index)
        agent = self._agent
        try:
            handle = agent.initialize_xfer(
                "WRITE",
                agent.get_xfer_descs([local], _nixl_kind(staging)),
                agent.get_xfer_descs([remote], peer.region.kind),
                peer.agent_name,
            )
        except self._errors as error:
            self._lose(link_id, str(error))
            return write_id
        peer.writes[write_id] = handle
        self._check(link_id, peer, write_id, agent.transfer)
        return write_id

    def poll(self) -> Sequence[TransportEvent]:
        pending = [
            (link_id, peer, write_id)
            for link_id, peer in self._peers.items()
            for write_id in list(peer.writes)
        ]
        for link_id, peer, write_id in pending:
            if write_id in peer.writes:
                self._check(link_id, peer, write_id, self._agent.check_xfer_state)
        if not pending:
            # Checking a write drives progress for all; without one, asking for notifications does.
            with suppress(*self._errors):
                self._agent.get_new_notifs()
        events, self._events = self._events, []
        return events

    def _check(self, link_id: int, peer: _Peer, write_id: int, ask: Any) -> None:
        handle = peer.writes[write_id]
        try:
            state = ask(handle)
        except self._errors as error:
            self._lose(link_id, str(error))
            return
        if state == "PROC":
            return
        if state != "DONE":
            self._lose(link_id, f"a write ended as {state}")
            return
        del peer.writes[write_id]
        self._release(handle)
        if peer.is_open:
            self._events.append(WriteCompleted(write_id))
        else:
            self._on_scratch_written(link_id, peer)

    def _on_scratch_written(self, link_id: int, peer: _Peer) -> None:
        """The trial is followed by the probe's writes, and these by the link's opening."""
        now_s = time.perf_counter()
        self._events.append(LinkTried(link_id))
        if peer.probe is None:
            peer.probe = LinkProbe(PROBE_BYTES[self._context.send_staging.device_kind])
        elif not peer.probe.write_ended(now_s):
            peer.is_open = True
            self._events.append(PeerConnected(link_id, peer.probe.bytes_per_s))
            return
        peer.probe.write_started(now_s)
        self._write_scratch(link_id, peer.region, peer.probe.num_bytes)

    def _refuse(self, link_id: int, region: _Region) -> None:
        """From host to GPU memory UCX would copy through buffers, at a hundredth of the speed of NVLink."""
        where = {"DRAM": "host memory", "VRAM": "the memory of a GPU"}
        mine, theirs = where[_nixl_kind(self._context.send_staging)], where[region.kind]
        error = TransferFailed(
            f"the receiver's KV is in {theirs}, the sender's in {mine}: both must be of one kind"
        )
        self._events.append(PeerLost(link_id, error))

    def _lose(self, link_id: int, reason: str) -> None:
        self.disconnect(link_id)
        self._events.append(PeerLost(link_id, TransferFailed(f"UCX lost the peer: {reason}")))

    def disconnect(self, link_id: int) -> None:
        peer = self._peers.pop(link_id, None)
        if peer is None:
            return
        for handle in peer.writes.values():
            self._release(handle)
        with suppress(*self._errors):
            self._agent.remove_remote_agent(peer.agent_name)
        undead, self._undead = self._undead, []
        for handle in undead:
            self._release(handle)

    def _release(self, handle: Any) -> None:
        """Free a handle; one that NIXL can't cancel yet is kept and tried again later."""
        try:
            handle.release()
        except self._errors:
            self._undead.append(handle)

    def close(self) -> None:
        for link_id in list(self._peers):
            self.disconnect(link_id)
        for registered in self._registered:
            with suppress(*self._errors):
                self._agent.deregister_memory(registered)
        self._registered.clear()
        self._undead.clear()
        del self._agent


def _nixl_kind(staging: StagingMemory) -> str:
    return "VRAM" if staging.device_kind is DeviceKind.CUDA else "DRAM"


def _extent(staging: StagingMemory) -> tuple[int, int, int]:
    return staging.address, staging.num_bytes, staging.device_index


def _import_nixl() -> ModuleType:
    try:
        import nixl_cu13
    except ImportError as error:
        raise ConfigError(f"NIXL can't be imported: {error}") from error
    # It configures a handler on standard output for itself, where our commands print answers.
    logging.getLogger("nixl").setLevel(logging.WARNING)
    return nixl_cu13


def _error_types(nixl: ModuleType) -> tuple[type[Exception], ...]:
    bindings = nixl._api.nixlBind
    found = [getattr(bindings, name) for name in dir(bindings) if name.endswith("Error")]
    return (RuntimeError, *(error for error in found if isinstance(error, type)))


def _new_agent(nixl: ModuleType, name: str) -> Any:
    config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    agent = nixl.nixl_agent(name, config)
    if "UCX" not in agent.backends:
        raise ConfigError("this build of NIXL has no UCX")
    return agent


def _settings(device_kind: DeviceKind, ucx_tls: str) -> dict[str, str]:
    """Environment variables that UCX reads when an agent is made; what the user has set stays."""
    has_rdma = _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())
    lanes = ["rc"] if has_rdma else []
    lanes += ["cuda_copy", "cuda_ipc"] if device_kind is DeviceKind.CUDA else []
    # Without tcp some lanes vanish silently when peers' errors are handled.
    lanes += ["sm", "self", "tcp"]
    settings = {"UCX_TLS": ",".join(lanes), "NIXL_LOG_LEVEL": "FATAL"}
    if not has_rdma:
        settings["UCX_MODULES"] = "^ib"
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    return {**settings, "UCX_TLS": ucx_tls} if ucx_tls else settings


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
