"""What is encoded, sent and decoded is what was meant; random bytes never do worse than InvalidRequest."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.codec import client_api, cluster, sampling
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.errors import InvalidRequest
from kvrelay.v1 import cluster_pb2, common_pb2, router_pb2

PAIRS = {
    "token_batch": (cluster.encode_token_batch, cluster.decode_token_batch, cluster_pb2.TokenBatch),
    "node_frame": (cluster.encode_node_frame, cluster.decode_node_frame, cluster_pb2.NodeFrame),
    "router_frame": (cluster.encode_router_frame, cluster.decode_router_frame, cluster_pb2.RouterFrame),
    "welcome": (cluster.encode_welcome, cluster.decode_welcome, cluster_pb2.RouterFrame),
    "hello": (cluster.encode_hello, cluster.decode_hello, cluster_pb2.NodeFrame),
    "sampling": (sampling.encode_sampling, sampling.decode_sampling, common_pb2.SamplingParams),
    "token_request": (
        cluster.encode_token_request,
        cluster.decode_token_request,
        cluster_pb2.TokenRequest,
    ),
    "generate": (client_api.encode_generate, client_api.decode_generate, router_pb2.GenerateRequest),
    "call_event": (
        client_api.encode_call_event,
        client_api.decode_call_event,
        router_pb2.GenerateResponse,
    ),
    "session_ask": (
        client_api.encode_session_ask,
        client_api.decode_session_ask,
        router_pb2.SessionRequest,
    ),
    "session_update": (
        client_api.encode_session_update,
        client_api.decode_session_update,
        router_pb2.SessionResponse,
    ),
    "cluster_state": (
        client_api.encode_cluster_state,
        client_api.decode_cluster_state,
        router_pb2.ClusterState,
    ),
    "explanation": (
        client_api.encode_explanation,
        client_api.decode_explanation,
        router_pb2.ExplainResponse,
    ),
    "models": (client_api.encode_models, client_api.decode_models, router_pb2.ListModelsResponse),
    "tokenizer_chunk": (
        client_api.encode_tokenizer_chunk,
        client_api.decode_tokenizer_chunk,
        common_pb2.TokenizerChunk,
    ),
}
DECODERS = {
    **{name: (decode, message) for name, (_, decode, message) in PAIRS.items()},
    "cancel": (client_api.decode_cancel, router_pb2.CancelRequest),
    "explain": (client_api.decode_explain, router_pb2.ExplainRequest),
    "watch_cluster": (client_api.decode_watch_cluster, router_pb2.WatchClusterRequest),
    "get_tokenizer": (client_api.decode_get_tokenizer, router_pb2.GetTokenizerRequest),
}


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_value_survives_the_wire(name, strategies, data):
    encode, decode, message = PAIRS[name]
    value = data.draw(strategies[name])
    assert decode(message.FromString(encode(value).SerializeToString())) == value


@pytest.mark.parametrize("name", DECODERS)
@given(raw=st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_random_bytes_decode_or_raise_invalid_request(name, raw):
    decode, message = DECODERS[name]
    try:
        pb = message.FromString(raw)
    except DecodeError:
        return
    decode_or_refuse(decode, pb)


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_message_decodes_or_raises_invalid_request(name, strategies, data):
    encode, decode, message = PAIRS[name]
    raw = bytearray(encode(data.draw(strategies[name])).SerializeToString() or b"\x00")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        pb = message.FromString(bytes(raw))
    except DecodeError:
        return
    decode_or_refuse(decode, pb)


def decode_or_refuse(decode, pb):
    refused_field = "nothing was refused"
    try:
        decode(pb)
    except InvalidRequest as refusal:
        refused_field = refusal.field
    assert refused_field, "a refusal names its field"


def test_an_unset_sampling_field_takes_the_default_and_zero_does_not():
    decoded = sampling.decode_sampling(common_pb2.SamplingParams())
    assert decoded.max_tokens == 256
    assert decoded.num_logprobs is None
    zero = sampling.decode_sampling(common_pb2.SamplingParams(num_logprobs=0, seed=0))
    assert (zero.num_logprobs, zero.seed) == (0, 0)


def test_a_counter_that_outgrows_the_wire_stays_at_its_most():
    """As where nodes have twice told of 2**64 - 1 bytes of KV."""
    grown = ClusterState("r", "1", 0.0, (), {}, {"kv_bytes": 2 * (2**64 - 1), "tokens": 5})
    assert client_api.encode_cluster_state(grown).counters == {"kv_bytes": 2**64 - 1, "tokens": 5}
