"""What takes bytes from other processes, each as a function that raises for nothing but a bug."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from kvrelay.codec import client_api, cluster
from kvrelay.codec.kv_event import decode_kv_event
from kvrelay.core.errors import InvalidRequest, TransferCorrupt
from kvrelay.kv_transfer.frame_reader import FrameReader
from kvrelay.kv_transfer.messages import decode, encode
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.kv_intake import KVIntake
from kvrelay.router.merge import batch_fault
from kvrelay.v1 import cluster_pb2, router_pb2

Target = Callable[[bytes], None]
MAX_INDEX_ENTRIES: Final = 64


def kv_wire(data: bytes) -> None:
    """Frames of KV transfer: what is taken is what would be sent."""
    reader = FrameReader()
    half = len(data) // 2
    with suppress(TransferCorrupt):
        for frame in [*reader.feed(data[:half]), *reader.feed(data[half:])]:
            assert decode(encode(frame)) == frame


def kv_event(data: bytes) -> None:
    """KV events, and the index that they go into."""
    config = RouterCoreConfig(max_index_entries=MAX_INDEX_ENTRIES, max_indexed_nodes=2)
    intake = KVIntake(config)
    holdings = intake.add_node(32, 0.0)
    with suppress(InvalidRequest):
        for message in _messages(data, cluster_pb2.KVEvent):
            intake.apply(holdings, decode_kv_event(message), 0.0)
            assert 0 <= intake.index.num_entries <= MAX_INDEX_ENTRIES
    intake.remove_node(holdings)
    assert intake.index.num_entries == 0


def node_frame(data: bytes) -> None:
    """Frames from a node, one behind the other; steps of tokens refer to the ones before."""
    decode_tokens = cluster.TokenBatchDecoder().decode
    with suppress(InvalidRequest):
        for message in _messages(data, cluster_pb2.NodeFrame):
            frame = cluster.decode_node_frame(message, decode_tokens)
            assert frame.tokens is None or batch_fault(frame.tokens) == ""


def session_update(data: bytes) -> None:
    """Messages to a client, one behind the other; rows refer to those of earlier ones."""
    _plain(router_pb2.SessionResponse, client_api.SessionUpdateDecoder().decode)(data)


def _plain(kind: type[Message], decoder: Callable[[Any], object]) -> Target:
    def target(data: bytes) -> None:
        with suppress(InvalidRequest):
            for message in _messages(data, kind):
                decoder(message)

    return target


def _messages(data: bytes, kind: type[Message]) -> list[Any]:
    """Messages behind two bytes of length each; up to the first that is none."""
    found = []
    while len(data) > 2:
        length = int.from_bytes(data[:2], "big")
        try:
            found.append(kind.FromString(data[2 : 2 + length]))
        except DecodeError:
            break
        data = data[2 + length :]
    return found


def framed(messages: list[Message]) -> bytes:
    """What `_messages` takes apart."""
    raw = [message.SerializeToString() for message in messages]
    return b"".join(len(data).to_bytes(2, "big") + data for data in raw)


TARGETS: Final[dict[str, Target]] = {
    "kv_wire": kv_wire,
    "kv_event": kv_event,
    "node_frame": node_frame,
    "router_frame": _plain(cluster_pb2.RouterFrame, cluster.decode_router_frame),
    "hello": _plain(cluster_pb2.NodeFrame, cluster.decode_hello),
    "welcome": _plain(cluster_pb2.RouterFrame, cluster.decode_welcome),
    "session_ask": _plain(router_pb2.SessionRequest, client_api.decode_session_ask),
    "session_update": session_update,
}
