from kvrelay.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role

class NodeFrame(_message.Message):
    __slots__ = ("hello", "tokens", "reports", "load", "tokenizer", "kv")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    tokens: TokenBatch
    reports: _containers.RepeatedCompositeFieldContainer[Report]
    load: _common_pb2.NodeLoad
    tokenizer: _common_pb2.TokenizerChunk
    kv: KVEvent
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., reports: _Optional[_Iterable[_Union[Report, _Mapping]]] = ..., load: _Optional[_Union[_common_pb2.NodeLoad, _Mapping]] = ..., tokenizer: _Optional[_Union[_common_pb2.TokenizerChunk, _Mapping]] = ..., kv: _Optional[_Union[KVEvent, _Mapping]] = ...) -> None: ...

class RouterFrame(_message.Message):
    __slots__ = ("welcome", "commands")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    commands: _containers.RepeatedCompositeFieldContainer[Command]
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., commands: _Optional[_Iterable[_Union[Command, _Mapping]]] = ...) -> None: ...

class KVFingerprint(_message.Message):
    __slots__ = ("model", "dtype", "num_layers", "num_kv_heads", "head_dim", "rope")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str
    def __init__(self, model: _Optional[str] = ..., dtype: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., rope: _Optional[str] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("node_id", "incarnation", "role", "model", "engine", "fingerprint", "vocab_size", "max_model_len", "num_blocks", "block_size", "max_num_seqs", "eos_token_ids", "transfer_address", "transport", "tokenizer_digest", "host", "pid", "version")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: int
    role: Role
    model: str
    engine: str
    fingerprint: KVFingerprint
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    transfer_address: str
    transport: str
    tokenizer_digest: str
    host: str
    pid: int
    version: str
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., fingerprint: _Optional[_Union[KVFingerprint, _Mapping]] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., transfer_address: _Optional[str] = ..., transport: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("router_id", "router_epoch", "heartbeat_s", "lease_s", "wants_tokenizer")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    WANTS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_epoch: int
    heartbeat_s: float
    lease_s: float
    wants_tokenizer: bool
    def __init__(self, router_id: _Optional[str] = ..., router_epoch: _Optional[int] = ..., heartbeat_s: _Optional[float] = ..., lease_s: _Optional[float] = ..., wants_tokenizer: _Optional[bool] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("attempts", "first_indices", "counts", "token_ids", "logprobs", "same_rows")
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDICES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SAME_ROWS_FIELD_NUMBER: _ClassVar[int]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    first_indices: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    same_rows: bool
    def __init__(self, attempts: _Optional[_Iterable[int]] = ..., first_indices: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., same_rows: _Optional[bool] = ...) -> None: ...

class KVEvent(_message.Message):
    __slots__ = ("first", "num_batches", "cleared", "part", "num_parts", "stored", "removed", "host_stored", "host_removed")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    HOST_STORED_FIELD_NUMBER: _ClassVar[int]
    HOST_REMOVED_FIELD_NUMBER: _ClassVar[int]
    first: int
    num_batches: int
    cleared: bool
    part: int
    num_parts: int
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    host_stored: _containers.RepeatedScalarFieldContainer[int]
    host_removed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, first: _Optional[int] = ..., num_batches: _Optional[int] = ..., cleared: _Optional[bool] = ..., part: _Optional[int] = ..., num_parts: _Optional[int] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ..., host_stored: _Optional[_Iterable[int]] = ..., host_removed: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenRequest(_message.Message):
    __slots__ = ("token_ids", "num_prompt_tokens", "sampling", "cache_salt")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _common_pb2.SamplingParams
    cache_salt: bytes
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., cache_salt: _Optional[bytes] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("attempt", "start_prefill", "reserve_decode", "release_kv", "send_kv_snapshot", "send_prefix", "stop_pull", "start_drain")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    START_PREFILL_FIELD_NUMBER: _ClassVar[int]
    RESERVE_DECODE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KV_FIELD_NUMBER: _ClassVar[int]
    SEND_KV_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SEND_PREFIX_FIELD_NUMBER: _ClassVar[int]
    STOP_PULL_FIELD_NUMBER: _ClassVar[int]
    START_DRAIN_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    start_prefill: StartPrefill
    reserve_decode: ReserveDecode
    release_kv: ReleaseKV
    send_kv_snapshot: SendKVSnapshot
    send_prefix: SendPrefix
    stop_pull: StopPull
    start_drain: StartDrain
    def __init__(self, attempt: _Optional[int] = ..., start_prefill: _Optional[_Union[StartPrefill, _Mapping]] = ..., reserve_decode: _Optional[_Union[ReserveDecode, _Mapping]] = ..., release_kv: _Optional[_Union[ReleaseKV, _Mapping]] = ..., send_kv_snapshot: _Optional[_Union[SendKVSnapshot, _Mapping]] = ..., send_prefix: _Optional[_Union[SendPrefix, _Mapping]] = ..., stop_pull: _Optional[_Union[StopPull, _Mapping]] = ..., start_drain: _Optional[_Union[StartDrain, _Mapping]] = ...) -> None: ...

class StartPrefill(_message.Message):
    __slots__ = ("request", "decode_address", "pull_attempt", "num_pull_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PULL_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_PULL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: TokenRequest
    decode_address: str
    pull_attempt: int
    num_pull_tokens: int
    def __init__(self, request: _Optional[_Union[TokenRequest, _Mapping]] = ..., decode_address: _Optional[str] = ..., pull_attempt: _Optional[int] = ..., num_pull_tokens: _Optional[int] = ...) -> None: ...

class ReserveDecode(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: TokenRequest
    def __init__(self, request: _Optional[_Union[TokenRequest, _Mapping]] = ...) -> None: ...

class ReleaseKV(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SendPrefix(_message.Message):
    __slots__ = ("token_ids", "cache_salt", "address")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: bytes
    address: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[bytes] = ..., address: _Optional[str] = ...) -> None: ...

class StopPull(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SendKVSnapshot(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartDrain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Report(_message.Message):
    __slots__ = ("attempt", "reserved", "prefill_finished", "handoff_verified", "attempt_refused", "attempt_finished", "attempt_failed", "kv_released", "drain_started")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FINISHED_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_REFUSED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FINISHED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FAILED_FIELD_NUMBER: _ClassVar[int]
    KV_RELEASED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_STARTED_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    reserved: Reserved
    prefill_finished: PrefillFinished
    handoff_verified: HandoffVerified
    attempt_refused: AttemptRefused
    attempt_finished: AttemptFinished
    attempt_failed: AttemptFailed
    kv_released: KVReleased
    drain_started: DrainStarted
    def __init__(self, attempt: _Optional[int] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., prefill_finished: _Optional[_Union[PrefillFinished, _Mapping]] = ..., handoff_verified: _Optional[_Union[HandoffVerified, _Mapping]] = ..., attempt_refused: _Optional[_Union[AttemptRefused, _Mapping]] = ..., attempt_finished: _Optional[_Union[AttemptFinished, _Mapping]] = ..., attempt_failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., kv_released: _Optional[_Union[KVReleased, _Mapping]] = ..., drain_started: _Optional[_Union[DrainStarted, _Mapping]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("num_cached_tokens",)
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_cached_tokens: int
    def __init__(self, num_cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("num_cached_tokens", "queue_s", "compute_s", "num_pulled_tokens", "pull_s", "pull_error")
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    PULL_ERROR_FIELD_NUMBER: _ClassVar[int]
    num_cached_tokens: int
    queue_s: float
    compute_s: float
    num_pulled_tokens: int
    pull_s: float
    pull_error: str
    def __init__(self, num_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., num_pulled_tokens: _Optional[int] = ..., pull_s: _Optional[float] = ..., pull_error: _Optional[str] = ...) -> None: ...

class HandoffVerified(_message.Message):
    __slots__ = ("num_bytes", "num_messages", "seconds", "transport")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    num_messages: int
    seconds: float
    transport: str
    def __init__(self, num_bytes: _Optional[int] = ..., num_messages: _Optional[int] = ..., seconds: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class AttemptRefused(_message.Message):
    __slots__ = ("code", "message", "field")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    field: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class AttemptFinished(_message.Message):
    __slots__ = ("finish_reason",)
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _common_pb2.FinishReason
    def __init__(self, finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("code", "message", "field")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    field: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class KVReleased(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainStarted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
