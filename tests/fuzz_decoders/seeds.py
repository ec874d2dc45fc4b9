"""Real encodings to begin with: what honest processes say."""

from __future__ import annotations

from kvrelay.codec import client_api, cluster
from kvrelay.codec.kv_event import encode_kv_event
from kvrelay.core.client_types import CallAccepted, GenerateCall, SessionAsk, SessionUpdate
from kvrelay.core.ids import AttemptId, NodeId, TransferId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    NodeFrame,
    NodeLoad,
    PrefillFinished,
    PullOrder,
    ReleaseKV,
    ReserveDecode,
    Role,
    RouterFrame,
    SendPrefix,
    StartPrefill,
    TokenBatch,
    Welcome,
)
from kvrelay.core.request import FinishReason, Prefix, TokenLogprobs, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.kv_transfer.frame_reader import frame_bytes
from kvrelay.kv_transfer.messages import Abort, Ack, Chunk, Finish, Grant, Hello, Offer, SlotsGranted, Want
from tests.fuzz_decoders.targets import framed

FINGERPRINT = KVFingerprint("m", "float32", 2, 2, 8, "r")
ID, ATTEMPT = TransferId(7, AttemptId(3)), AttemptId(3)
REQUEST = TokenRequest(
    (5, 6, 7), 3, SamplingParams(max_tokens=4, num_logprobs=1, stop_token_ids=(2,)), b"salt"
)


def seeds() -> dict[str, list[bytes]]:
    """By target."""
    steps = TokenBatch([3, 4], [1, 1], [1, 1], [10, 11])
    encode_tokens = cluster.TokenBatchEncoder().encode
    frames = [
        NodeFrame(tokens=steps),
        NodeFrame(tokens=steps.next_step([12, 13])),
        NodeFrame(
            TokenBatch([3], [3], [1], [9], (TokenLogprobs(-0.5, ((9, -0.5),)),)),
            (PrefillFinished(ATTEMPT, 1, 0.1, 0.2), HandoffVerified(ATTEMPT, 100, 2, 0.1, "tcp")),
            NodeLoad(num_running=2),
        ),
        NodeFrame(
            reports=(
                AttemptFinished(ATTEMPT, FinishReason.STOP),
                AttemptFailed(ATTEMPT, "OVERLOADED", "no"),
                KVReleased(ATTEMPT),
            )
        ),
    ]
    events = [KVEvent(1, 0, KVChanges([1, 2], cleared=True)), KVEvent(1, 1, KVChanges([3], [1], [4], [5]))]
    commands = (
        StartPrefill(ATTEMPT, REQUEST, "d:1", PullOrder(AttemptId(9), 2)),
        ReserveDecode(ATTEMPT, REQUEST),
        SendPrefix(ATTEMPT, Prefix((1, 2), b"s"), "p:1"),
        ReleaseKV(ATTEMPT),
    )
    ask = SessionAsk(((1, GenerateCall("r", "m", REQUEST, 5.0)),), (2,), (3,))
    update = SessionUpdate([1], [2], [5, 6], (), [(1, CallAccepted("r", 4))], [])
    return {
        "kv_wire": [_kv_wire()],
        "kv_event": [framed([encode_kv_event(event) for event in events])],
        "node_frame": [framed([cluster.encode_node_frame(frame, encode_tokens) for frame in frames])],
        "router_frame": [framed([cluster.encode_router_frame(RouterFrame(commands))])],
        "hello": [framed([cluster.encode_hello(_description())])],
        "welcome": [framed([cluster.encode_welcome(Welcome("r", 7, 1.0, 10.0, True))])],
        "session_ask": [framed([client_api.encode_session_ask(ask)])],
        "session_update": [framed([client_api.encode_session_update(update)])],
    }


def _kv_wire() -> bytes:
    frames = (
        Hello(3, "node", "1", FINGERPRINT, "tcp", b"ep", b"t" * 16, 4096, 8),
        Offer(ID, 16, b"d" * 32, FINGERPRINT.digest, 2),
        Grant(ID, 0),
        Want(ID, 1),
        SlotsGranted(ID, (0, 1)),
        Chunk(ID, 0, 1, range(2), range(8), 512, True, 2**63),
        Finish(ID, 1, 512, 9),
        Ack(ID),
        Abort(ID, "TRANSFER_FAILED", "no"),
    )
    return b"".join(frame_bytes(frame) for frame in frames)


def _description() -> NodeDescription:
    return NodeDescription(
        NodeId("d0"), 1, Role.DECODE, "m", "sim", FINGERPRINT, 100, 100, 10, 16, 4, (2,), "d:1", "tcp"
    )
