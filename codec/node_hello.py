"""The first words of an `Attach` stream: who the node is, and what the router answers."""

from __future__ import annotations

import string
from typing import Final

from kvrelay.codec.bounds import length, seconds, text, token_ids, whole
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import NodeId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.node_messages import NodeDescription, Role, Welcome
from kvrelay.v1 import cluster_pb2

MAX_NODE_ID_CHARS: Final = 128
MAX_NAME_CHARS: Final = 256
MAX_EOS_TOKENS: Final = 64
_MAX_DIMENSION: Final = 1 << 20

_ROLE_OF_NUMBER: Final = {
    int(cluster_pb2.ROLE_PREFILL): Role.PREFILL,
    int(cluster_pb2.ROLE_DECODE): Role.DECODE,
}
_NUMBER_OF_ROLE: Final = {Role.PREFILL: cluster_pb2.ROLE_PREFILL, Role.DECODE: cluster_pb2.ROLE_DECODE}


def encode_hello(node: NodeDescription) -> cluster_pb2.NodeFrame:
    """A node's first frame."""
    hello = cluster_pb2.NodeHello(
        node_id=node.node_id,
        incarnation=node.incarnation,
        role=_NUMBER_OF_ROLE[node.role],
        model=node.model,
        engine=node.engine,
        fingerprint=_encode_fingerprint(node.fingerprint),
        vocab_size=node.vocab_size,
        max_model_len=node.max_model_len,
        num_blocks=node.num_blocks,
        block_size=node.block_size,
        max_num_seqs=node.max_num_seqs,
        eos_token_ids=node.eos_token_ids,
        transfer_address=node.transfer_address,
        transport=node.transport,
        tokenizer_digest=node.tokenizer_digest,
        host=node.host,
        pid=node.pid,
        version=node.version,
    )
    return cluster_pb2.NodeFrame(hello=hello)


def decode_hello(pb: cluster_pb2.NodeFrame) -> NodeDescription:
    """A node's first frame.

    Raises:
        InvalidRequest: it carries no hello, or anything else beside it, or a field is out of range.
    """
    if not pb.HasField("hello"):
        raise InvalidRequest("hello must come with the first frame", field="hello")
    if pb.HasField("tokens") or pb.reports or pb.HasField("load") or pb.HasField("tokenizer"):
        raise InvalidRequest("hello must come alone", field="hello")
    hello = pb.hello
    role = _decode_role(hello.role)
    return NodeDescription(
        node_id=NodeId(text(hello.node_id, "hello.node_id", MAX_NODE_ID_CHARS, is_required=True)),
        incarnation=hello.incarnation,
        role=role,
        model=text(hello.model, "hello.model", MAX_NAME_CHARS, is_required=True),
        engine=text(hello.engine, "hello.engine", 64, is_required=True),
        fingerprint=_decode_fingerprint(hello),
        vocab_size=whole(hello.vocab_size, "hello.vocab_size", 1),
        max_model_len=whole(hello.max_model_len, "hello.max_model_len", 2),
        num_blocks=whole(hello.num_blocks, "hello.num_blocks", 1),
        block_size=whole(hello.block_size, "hello.block_size", 1, _MAX_DIMENSION),
        max_num_seqs=whole(hello.max_num_seqs, "hello.max_num_seqs", 1, _MAX_DIMENSION),
        eos_token_ids=_decode_eos(hello),
        transfer_address=_decode_address(hello, role),
        transport=text(hello.transport, "hello.transport", 64),
        tokenizer_digest=decode_digest(hello.tokenizer_digest, "hello.tokenizer_digest"),
        host=text(hello.host, "hello.host", MAX_NAME_CHARS),
        pid=hello.pid,
        version=text(hello.version, "hello.version", 64),
    )


def _decode_role(number: int) -> Role:
    role = _ROLE_OF_NUMBER.get(number)
    if role is None:
        raise InvalidRequest(f"hello.role is {number}, which is no role", field="hello.role")
    return role


def _decode_eos(hello: cluster_pb2.NodeHello) -> tuple[int, ...]:
    length(len(hello.eos_token_ids), "hello.eos_token_ids", MAX_EOS_TOKENS)
    return token_ids(hello.eos_token_ids, "hello.eos_token_ids")


def _decode_address(hello: cluster_pb2.NodeHello, role: Role) -> str:
    return text(
        hello.transfer_address,
        "hello.transfer_address",
        MAX_NAME_CHARS,
        is_required=role is Role.DECODE,
    )


def decode_digest(digest: str, field: str) -> str:
    """Empty, or 64 lower-case hex digits."""
    if digest and (len(digest) != 64 or not set(digest) <= set(string.hexdigits.lower())):
        raise InvalidRequest(f"{field} must be 64 lower-case hex digits", field=field)
    return digest


def _encode_fingerprint(fingerprint: KVFingerprint) -> cluster_pb2.KVFingerprint:
    return cluster_pb2.KVFingerprint(
        model=fingerprint.model,
        dtype=fingerprint.dtype,
        num_layers=fingerprint.num_layers,
        num_kv_heads=fingerprint.num_kv_heads,
        head_dim=fingerprint.head_dim,
        rope=fingerprint.rope,
    )


def _decode_fingerprint(hello: cluster_pb2.NodeHello) -> KVFingerprint:
    if not hello.HasField("fingerprint"):
        raise InvalidRequest("hello.fingerprint is missing", field="hello.fingerprint")
    pb, where = hello.fingerprint, "hello.fingerprint"
    return KVFingerprint(
        model=text(pb.model, f"{where}.model", 512, is_required=True),
        dtype=text(pb.dtype, f"{where}.dtype", 32, is_required=True),
        num_layers=whole(pb.num_layers, f"{where}.num_layers", 1, _MAX_DIMENSION),
        num_kv_heads=whole(pb.num_kv_heads, f"{where}.num_kv_heads", 1, _MAX_DIMENSION),
        head_dim=whole(pb.head_dim, f"{where}.head_dim", 1, _MAX_DIMENSION),
        rope=text(pb.rope, f"{where}.rope", MAX_NAME_CHARS),
    )


def encode_welcome(welcome: Welcome) -> cluster_pb2.RouterFrame:
    """A router's first frame."""
    return cluster_pb2.RouterFrame(
        welcome=cluster_pb2.Welcome(
            router_id=welcome.router_id,
            router_epoch=welcome.router_epoch,
            heartbeat_s=welcome.heartbeat_s,
            lease_s=welcome.lease_s,
            wants_tokenizer=welcome.wants_tokenizer,
        )
    )


def decode_welcome(pb: cluster_pb2.RouterFrame) -> Welcome:
    """A router's first frame.

    Raises:
        InvalidRequest: it carries no welcome, or a field is out of range.
    """
    if not pb.HasField("welcome"):
        raise InvalidRequest("welcome must come with the first frame", field="welcome")
    if pb.commands:
        raise InvalidRequest("welcome must come alone", field="welcome")
    welcome = pb.welcome
    return Welcome(
        router_id=text(welcome.router_id, "welcome.router_id", MAX_NAME_CHARS),
        router_epoch=whole(welcome.router_epoch, "welcome.router_epoch", 1, 2**63 - 1),
        heartbeat_s=seconds(welcome.heartbeat_s, "welcome.heartbeat_s", is_positive=True),
        lease_s=seconds(welcome.lease_s, "welcome.lease_s", is_positive=True),
        wants_tokenizer=welcome.wants_tokenizer,
    )
