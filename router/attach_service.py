"""The node-facing service `Cluster`: one `Attach` stream per node."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import grpc

from kvrelay.codec.cluster import (
    TokenBatchDecoder,
    decode_hello,
    decode_node_frame,
    encode_router_frame,
    encode_welcome,
)
from kvrelay.core.errors import InvalidRequest, KVRelayError, NodeUnavailable
from kvrelay.core.node_messages import NodeDescription, Welcome
from kvrelay.router.attachments import Attachment
from kvrelay.router.grpc_handlers import Context, both_streams, read_message, register
from kvrelay.router.shell import RouterShell
from kvrelay.v1 import cluster_pb2

logger = logging.getLogger(__name__)

LAST_WRITE_S: Final = 0.5
SERVICE_NAME: Final = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name


class AttachService:
    """Serves `Attach`. A node's bad frame ends its stream, and nothing else."""

    def __init__(self, shell: RouterShell, router_id: str) -> None:
        self._shell = shell
        self._router_id = router_id

    def register(self, server: grpc.aio.Server) -> None:
        register(server, SERVICE_NAME, {"Attach": both_streams(self.attach, cluster_pb2.NodeFrame)})

    async def attach(self, context: Context) -> None:
        """One node, from its hello to the end of its stream.

        Raises:
            InvalidRequest: the node said something that can't be; the field is named.
            NodeUnavailable: it was silent for too long, or attached anew.
        """
        attachment = self._shell.attach(await self._read_hello(context))
        reason: KVRelayError = NodeUnavailable("its stream broke")
        try:
            reason = await self._serve(attachment, context)
        finally:
            self._shell.detach(attachment, reason.message)
        if not isinstance(reason, _StreamEnded):
            logger.warning("node=%s stream ended error=%s", attachment.node_id, reason.message)
            raise reason

    async def _read_hello(self, context: Context) -> NodeDescription:
        try:
            async with asyncio.timeout(self._shell.config.hello_timeout_s):
                first = await read_message(context)
        except TimeoutError:
            raise InvalidRequest("hello did not come in time", field="hello") from None
        if first is None:
            raise InvalidRequest("the stream ended before hello", field="hello")
        return decode_hello(first)

    async def _serve(self, attachment: Attachment, context: Context) -> KVRelayError:
        """Read and write until one of the two ends, or the shell ends the attachment; returns why."""
        reading = asyncio.create_task(self._read(attachment, context))
        writing = asyncio.create_task(self._write(attachment, context))
        try:
            await asyncio.wait({reading, writing, attachment.ended}, return_when=asyncio.FIRST_COMPLETED)
            return await _outcome(attachment, reading, writing)
        finally:
            attachment.outbox.close()
            # A write that is cut short can't be followed by a status: give it a moment.
            await asyncio.wait({writing}, timeout=LAST_WRITE_S)
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _read(self, attachment: Attachment, context: Context) -> KVRelayError:
        hear, decode_tokens = self._shell.hear, TokenBatchDecoder().decode
        while (received := await read_message(context)) is not None:
            hear(attachment, decode_node_frame(received, decode_tokens))
        return _StreamEnded("it ended its stream")

    async def _write(self, attachment: Attachment, context: Context) -> KVRelayError:
        await context.write(encode_welcome(self._welcome(attachment)))
        while (frame := await attachment.outbox.take()) is not None:
            await context.write(encode_router_frame(frame))
            attachment.last_sent_s = self._shell.clock.now_s()
        return _StreamEnded("the router ended its stream")

    def _welcome(self, attachment: Attachment) -> Welcome:
        core = self._shell.config.core
        return Welcome(
            router_id=self._router_id,
            router_epoch=self._shell.router_epoch,
            heartbeat_s=core.heartbeat_s,
            lease_s=core.lease_s,
            wants_tokenizer=attachment.tokenizer is not None,
        )


class _StreamEnded(NodeUnavailable):
    """The node ended its stream as it should."""


async def _outcome(
    attachment: Attachment, reading: asyncio.Task[KVRelayError], writing: asyncio.Task[KVRelayError]
) -> KVRelayError:
    if attachment.ended.done():
        return attachment.ended.result()
    try:
        return await (reading if reading.done() else writing)
    except KVRelayError as error:
        return error
    except (grpc.aio.AbortError, grpc.RpcError, asyncio.InvalidStateError) as error:
        return NodeUnavailable(f"its stream broke: {error}")
