"""A node in a process of its own, driven by JSON lines on stdin, for `test_processes.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import conftest as kv
import numpy as np

from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushSpec, ReceiveDone, TransferEvent
from kvrelay.kv_transfer.service import KVTransferService


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class Peer:
    def __init__(self, name: str, config: KVTransferConfig) -> None:
        self.store = kv.NumpyStore(block_size=24)
        self.service = KVTransferService(name, self.store, kv.FINGERPRINT, config, self.on_event)
        self.tables: dict[TransferId, tuple[Any, int]] = {}
        self.next_block = 0

    def take_blocks(self, transfer_id: TransferId, num_tokens: int) -> tuple[Any, ...]:
        num_blocks = -(-num_tokens // 24)
        table = tuple(reversed(range(self.next_block, self.next_block + num_blocks)))
        self.next_block += num_blocks
        self.tables[transfer_id] = (table, num_tokens)
        return table

    def on_event(self, event: TransferEvent) -> None:
        digest = ""
        if isinstance(event, ReceiveDone):
            table, num_tokens = self.tables[event.transfer_id]
            content = self.store.read(table, range(kv.NUM_LAYERS), range(num_tokens))
            digest = sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
        error = str(getattr(event, "error", ""))
        say(event=type(event).__name__, attempt=event.transfer_id.attempt, digest=digest, error=error)

    def obey(self, command: dict[str, Any]) -> None:
        transfer_id = TransferId(7, AttemptId(command["attempt"]))
        num_tokens = command["num_tokens"]
        table = self.take_blocks(transfer_id, num_tokens)
        if command["op"] == "expect":
            self.service.expect(ExpectedTransfer(transfer_id, table, num_tokens, 0, kv.DIGEST))
            return
        blocks, within = self.store.slots(table, range(num_tokens))
        shape = (kv.NUM_LAYERS, 2, num_tokens, 2, 8)
        content = np.random.default_rng(command["attempt"]).standard_normal(shape, dtype=np.float32)
        self.store.cache[:, :, blocks, within] = content
        self.service.open_push(PushSpec(transfer_id, command["address"], num_tokens, kv.DIGEST))
        self.service.push_ready(transfer_id, table, range(kv.NUM_LAYERS), range(command["num_ready"]))
        if command["num_ready"] == num_tokens:
            self.service.finish_push(transfer_id, 42)


async def main() -> None:
    options = json.loads(sys.argv[1])
    peer = Peer(options.pop("name"), KVTransferConfig(**options))
    await peer.service.start()
    say(address=peer.service.address)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        peer.obey(json.loads(line))
    await peer.service.close()


asyncio.run(main())
