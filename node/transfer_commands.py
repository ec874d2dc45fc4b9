"""Performs what a node's core has decided about KV transfers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import assert_never

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import TransferId
from kvrelay.kv_transfer.interface import KVTransfer, PushFailed, ReceiveFailed
from kvrelay.node.events import (
    CancelTransfer,
    ExpectTransfer,
    FinishPush,
    NodeEvent,
    OpenPush,
    PushPrefix,
    RefuseTransfer,
    TransferCancelled,
    TransferCommand,
)

NO_TOKEN = 0
"""What a prefix is finished with: nobody has drawn a token after it."""


class TransferCommands:
    """On the event loop. `tell` takes what comes of the commands, `on_crash` a bug.

    `num_layers` is how many the KV has.
    """

    def __init__(
        self,
        transfer: KVTransfer,
        num_layers: int,
        tell: Callable[[NodeEvent], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._transfer = transfer
        self._num_layers = num_layers
        self._tell = tell
        self._on_crash = on_crash
        self._cancels: set[asyncio.Task[None]] = set()

    def perform(self, command: TransferCommand) -> None:
        """Never blocks."""
        match command:
            case OpenPush(spec):
                try:
                    self._transfer.open_push(spec)
                except KVRelayError as error:
                    self._tell(PushFailed(spec.transfer_id, error))
            case ExpectTransfer(expected):
                try:
                    self._transfer.expect(expected)
                except KVRelayError as error:
                    self._tell(ReceiveFailed(expected.transfer_id, error))
            case PushPrefix(transfer_id, block_table, num_tokens):
                layers, tokens = range(self._num_layers), range(num_tokens)
                self._transfer.push_ready(transfer_id, block_table, layers, tokens)
                self._transfer.finish_push(transfer_id, NO_TOKEN)
            case FinishPush(transfer_id, output_token_id):
                self._transfer.finish_push(transfer_id, output_token_id)
            case RefuseTransfer(transfer_id):
                self._transfer.refuse(transfer_id)
            case CancelTransfer(transfer_id):
                task = asyncio.create_task(self._cancel(transfer_id))
                self._cancels.add(task)
                task.add_done_callback(self._cancels.discard)
            case _:
                assert_never(command)

    async def wait_cancelled(self, timeout_s: float) -> None:
        """Until every cancel that was asked for is done, but no longer than `timeout_s`."""
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=timeout_s)

    async def _cancel(self, transfer_id: TransferId) -> None:
        try:
            await self._transfer.cancel(transfer_id)
        except Exception as error:  # its own task's outermost frame: a bug ends the process
            self._on_crash(error)
            return
        self._tell(TransferCancelled(transfer_id))
