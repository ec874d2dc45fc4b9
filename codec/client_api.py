"""Everything of the `Router` service, both ways, under one name."""

from kvrelay.codec.cluster import decode_tokenizer_chunk, encode_tokenizer_chunk
from kvrelay.codec.cluster_view import (
    decode_cluster_state,
    decode_models,
    encode_cluster_state,
    encode_models,
)
from kvrelay.codec.errors import decode_failed, encode_failed
from kvrelay.codec.explanation import decode_explanation, encode_explanation
from kvrelay.codec.generate import (
    decode_call_event,
    decode_generate,
    encode_call_event,
    encode_generate,
)
from kvrelay.codec.session import (
    SessionUpdateDecoder,
    SessionUpdateEncoder,
    decode_session_ask,
    decode_session_update,
    encode_session_ask,
    encode_session_update,
)
from kvrelay.codec.small_requests import (
    decode_cancel,
    decode_drain_node,
    decode_explain,
    decode_get_tokenizer,
    decode_watch_cluster,
    encode_cancel,
    encode_drain_node,
    encode_explain,
    encode_get_tokenizer,
    encode_watch_cluster,
)

__all__ = [
    "SessionUpdateDecoder",
    "SessionUpdateEncoder",
    "decode_call_event",
    "decode_cancel",
    "decode_cluster_state",
    "decode_drain_node",
    "decode_explain",
    "decode_explanation",
    "decode_failed",
    "decode_generate",
    "decode_get_tokenizer",
    "decode_models",
    "decode_session_ask",
    "decode_session_update",
    "decode_tokenizer_chunk",
    "decode_watch_cluster",
    "encode_call_event",
    "encode_cancel",
    "encode_cluster_state",
    "encode_drain_node",
    "encode_explain",
    "encode_explanation",
    "encode_failed",
    "encode_generate",
    "encode_get_tokenizer",
    "encode_models",
    "encode_session_ask",
    "encode_session_update",
    "encode_tokenizer_chunk",
    "encode_watch_cluster",
]
