"""Messages of a receiver on their way from its staging slots into the cache."""

from __future__ import annotations

from kvrelay.core.errors import KVRelayError, TransferCorrupt
from kvrelay.core.ids import TransferId
from kvrelay.core.kv import DeviceKind, StagingMemory
from kvrelay.kv_transfer.copies import Copies
from kvrelay.kv_transfer.local_node import LocalNode, checksum_of
from kvrelay.kv_transfer.receive_events import MessageScattered, ReceiveEvent, ReceiveGivenUp, ScatterMessage
from kvrelay.kv_transfer.slot_pool import SlotPool


class Scatters:
    """Frees the slot of each message in `pool` once nothing reads it any more."""

    def __init__(self, node: LocalNode, staging: StagingMemory, pool: SlotPool[TransferId]) -> None:
        self._store = node.store
        self._slot_bytes = node.slots.slot_bytes
        self._staging = staging
        self._pool = pool
        self._checks = node.config.verify_checksums and staging.device_kind is DeviceKind.CPU
        self._copies: Copies[tuple[TransferId, int]] = Copies()

    def __bool__(self) -> bool:
        """Whether any are under way."""
        return bool(self._copies)

    def begin(self, transfer_id: TransferId, message: ScatterMessage) -> ReceiveEvent | None:
        """Verify and scatter a message; returns what came of it, None while it is under way."""
        offset = message.slot * self._slot_bytes
        if (wrong := self._wrong_checksum(message, offset)) is not None:
            self._pool.free(message.slot)
            return ReceiveGivenUp(wrong)
        part = message.part
        copy = self._store.scatter(message.block_table, part.layers, part.tokens, self._staging, offset)
        assert copy.num_bytes == message.num_bytes, f"scatters {copy.num_bytes} of {message.num_bytes} bytes"
        if not copy.is_done():
            self._copies.add(transfer_id, copy, (transfer_id, message.slot))
            return None
        self._pool.free(message.slot)
        return MessageScattered()

    def pop_done(self) -> TransferId | None:
        """The transfer of a message that is in the cache now; each message once."""
        done = self._copies.pop_done()
        if done is None:
            return None
        transfer_id, slot = done
        self._pool.free(slot)
        return transfer_id

    def stop(self, transfer_id: TransferId) -> None:
        """On return nothing writes the transfer's blocks, nor reads a slot that others may get."""
        for _, slot in self._copies.take(transfer_id):
            self._pool.free(slot)

    def settle(self) -> None:
        """Wait for all."""
        self._copies.settle()

    def _wrong_checksum(self, message: ScatterMessage, offset: int) -> KVRelayError | None:
        if not self._checks:
            return None
        if message.checksum is None:
            # Its slot may hold what another transfer has left there, and nothing that was written for this.
            return TransferCorrupt(
                f"{message.part} came without a checksum, which this node asks for (verify_checksums)"
            )
        if checksum_of(self._staging, offset, message.num_bytes) == message.checksum:
            return None
        return TransferCorrupt(f"the checksum of {message.part} does not match")
