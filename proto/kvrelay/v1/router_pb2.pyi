from kvrelay.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority

class DrainNodeRequest(_message.Message):
    __slots__ = ("node_id",)
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    def __init__(self, node_id: _Optional[str] = ...) -> None: ...

class DrainNodeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt_token_ids", "output_token_ids", "sampling", "timeout_s", "cache_salt", "priority", "tenant", "ttft_timeout_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TTFT_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    timeout_s: float
    cache_salt: bytes
    priority: Priority
    tenant: str
    ttft_timeout_s: float
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., timeout_s: _Optional[float] = ..., cache_salt: _Optional[bytes] = ..., priority: _Optional[_Union[Priority, str]] = ..., tenant: _Optional[str] = ..., ttft_timeout_s: _Optional[float] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "tokens", "finished")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    tokens: Tokens
    finished: Finished
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_id", "seed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seed: int
    def __init__(self, request_id: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("finish_reason", "report")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _common_pb2.FinishReason
    report: RequestReport
    def __init__(self, finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., report: _Optional[_Union[RequestReport, _Mapping]] = ...) -> None: ...

class RequestReport(_message.Message):
    __slots__ = ("prefill_node", "decode_node", "num_attempts", "num_prompt_tokens", "num_output_tokens", "num_cached_tokens", "queue_s", "ttft_s", "total_s", "kv_bytes", "kv_messages", "kv_seconds", "kv_transport", "num_pulled_tokens")
    PREFILL_NODE_FIELD_NUMBER: _ClassVar[int]
    DECODE_NODE_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    KV_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefill_node: str
    decode_node: str
    num_attempts: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    kv_bytes: int
    kv_messages: int
    kv_seconds: float
    kv_transport: str
    num_pulled_tokens: int
    def __init__(self, prefill_node: _Optional[str] = ..., decode_node: _Optional[str] = ..., num_attempts: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., total_s: _Optional[float] = ..., kv_bytes: _Optional[int] = ..., kv_messages: _Optional[int] = ..., kv_seconds: _Optional[float] = ..., kv_transport: _Optional[str] = ..., num_pulled_tokens: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message", "field", "retry_after_s", "retryable")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    field: str
    retry_after_s: float
    retryable: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., retryable: _Optional[bool] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("generate", "cancel", "finish")
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    generate: _containers.RepeatedCompositeFieldContainer[SessionGenerate]
    cancel: _containers.RepeatedScalarFieldContainer[int]
    finish: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, generate: _Optional[_Iterable[_Union[SessionGenerate, _Mapping]]] = ..., cancel: _Optional[_Iterable[int]] = ..., finish: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionGenerate(_message.Message):
    __slots__ = ("stream_id", "request")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    request: GenerateRequest
    def __init__(self, stream_id: _Optional[int] = ..., request: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("stream_ids", "counts", "token_ids", "logprobs", "accepted", "finished", "failed", "row_set")
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ROW_SET_FIELD_NUMBER: _ClassVar[int]
    stream_ids: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    accepted: _containers.RepeatedCompositeFieldContainer[SessionAccepted]
    finished: _containers.RepeatedCompositeFieldContainer[SessionFinished]
    failed: _containers.RepeatedCompositeFieldContainer[SessionFailed]
    row_set: int
    def __init__(self, stream_ids: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., accepted: _Optional[_Iterable[_Union[SessionAccepted, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[SessionFinished, _Mapping]]] = ..., failed: _Optional[_Iterable[_Union[SessionFailed, _Mapping]]] = ..., row_set: _Optional[int] = ...) -> None: ...

class SessionAccepted(_message.Message):
    __slots__ = ("stream_id", "accepted")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    accepted: Accepted
    def __init__(self, stream_id: _Optional[int] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ...) -> None: ...

class SessionFinished(_message.Message):
    __slots__ = ("stream_id", "finished")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    finished: Finished
    def __init__(self, stream_id: _Optional[int] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class SessionFailed(_message.Message):
    __slots__ = ("stream_id", "failed")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    failed: Failed
    def __init__(self, stream_id: _Optional[int] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("request_id", "router_id", "model", "placed_ago_s", "decision", "measured", "predicted_queue_s", "predicted_total_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PLACED_AGO_S_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    router_id: str
    model: str
    placed_ago_s: float
    decision: Decision
    measured: MeasuredRequest
    predicted_queue_s: float
    predicted_total_s: float
    def __init__(self, request_id: _Optional[str] = ..., router_id: _Optional[str] = ..., model: _Optional[str] = ..., placed_ago_s: _Optional[float] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ..., measured: _Optional[_Union[MeasuredRequest, _Mapping]] = ..., predicted_queue_s: _Optional[float] = ..., predicted_total_s: _Optional[float] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("policy", "prefill_node", "decode_node", "predicted_ttft_s", "candidates", "pull_from", "num_pull_tokens")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NODE_FIELD_NUMBER: _ClassVar[int]
    DECODE_NODE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    PULL_FROM_FIELD_NUMBER: _ClassVar[int]
    NUM_PULL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    prefill_node: str
    decode_node: str
    predicted_ttft_s: float
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    pull_from: str
    num_pull_tokens: int
    def __init__(self, policy: _Optional[str] = ..., prefill_node: _Optional[str] = ..., decode_node: _Optional[str] = ..., predicted_ttft_s: _Optional[float] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., pull_from: _Optional[str] = ..., num_pull_tokens: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("node_id", "role", "score", "terms", "objection")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    OBJECTION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    role: str
    score: float
    terms: _containers.RepeatedCompositeFieldContainer[ScoreTerm]
    objection: str
    def __init__(self, node_id: _Optional[str] = ..., role: _Optional[str] = ..., score: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[ScoreTerm, _Mapping]]] = ..., objection: _Optional[str] = ...) -> None: ...

class ScoreTerm(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class MeasuredRequest(_message.Message):
    __slots__ = ("state", "num_attempts", "num_prompt_tokens", "num_output_tokens", "queue_s", "ttft_s", "total_s", "finish_reason", "error_code", "error_message", "placed_ttft_s", "num_cached_tokens", "prefill_queue_s", "prefill_compute_s", "kv_bytes", "kv_seconds", "kv_transport", "num_pulled_tokens", "pull_s", "pull_error", "handoff_s", "num_held_tokens")
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PLACED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    PULL_ERROR_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    state: str
    num_attempts: int
    num_prompt_tokens: int
    num_output_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    finish_reason: _common_pb2.FinishReason
    error_code: str
    error_message: str
    placed_ttft_s: float
    num_cached_tokens: int
    prefill_queue_s: float
    prefill_compute_s: float
    kv_bytes: int
    kv_seconds: float
    kv_transport: str
    num_pulled_tokens: int
    pull_s: float
    pull_error: str
    handoff_s: float
    num_held_tokens: int
    def __init__(self, state: _Optional[str] = ..., num_attempts: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., total_s: _Optional[float] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., placed_ttft_s: _Optional[float] = ..., num_cached_tokens: _Optional[int] = ..., prefill_queue_s: _Optional[float] = ..., prefill_compute_s: _Optional[float] = ..., kv_bytes: _Optional[int] = ..., kv_seconds: _Optional[float] = ..., kv_transport: _Optional[str] = ..., num_pulled_tokens: _Optional[int] = ..., pull_s: _Optional[float] = ..., pull_error: _Optional[str] = ..., handoff_s: _Optional[float] = ..., num_held_tokens: _Optional[int] = ...) -> None: ...

class WatchClusterRequest(_message.Message):
    __slots__ = ("interval_s", "once")
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    ONCE_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    once: bool
    def __init__(self, interval_s: _Optional[float] = ..., once: _Optional[bool] = ...) -> None: ...

class ClusterState(_message.Message):
    __slots__ = ("router_id", "version", "uptime_s", "nodes", "num_requests", "counters", "mismatches", "index", "queues")
    class NumRequestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    version: str
    uptime_s: float
    nodes: _containers.RepeatedCompositeFieldContainer[NodeState]
    num_requests: _containers.ScalarMap[str, int]
    counters: _containers.ScalarMap[str, int]
    mismatches: _containers.RepeatedScalarFieldContainer[str]
    index: BlockIndexState
    queues: _containers.RepeatedCompositeFieldContainer[QueueState]
    def __init__(self, router_id: _Optional[str] = ..., version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., nodes: _Optional[_Iterable[_Union[NodeState, _Mapping]]] = ..., num_requests: _Optional[_Mapping[str, int]] = ..., counters: _Optional[_Mapping[str, int]] = ..., mismatches: _Optional[_Iterable[str]] = ..., index: _Optional[_Union[BlockIndexState, _Mapping]] = ..., queues: _Optional[_Iterable[_Union[QueueState, _Mapping]]] = ...) -> None: ...

class QueueState(_message.Message):
    __slots__ = ("priority", "num_queued", "max_queued", "refused")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    priority: Priority
    num_queued: int
    max_queued: int
    refused: _containers.ScalarMap[str, int]
    def __init__(self, priority: _Optional[_Union[Priority, str]] = ..., num_queued: _Optional[int] = ..., max_queued: _Optional[int] = ..., refused: _Optional[_Mapping[str, int]] = ...) -> None: ...

class BlockIndexState(_message.Message):
    __slots__ = ("num_entries", "max_entries", "num_bytes", "num_evicted")
    NUM_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MAX_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    num_entries: int
    max_entries: int
    num_bytes: int
    num_evicted: int
    def __init__(self, num_entries: _Optional[int] = ..., max_entries: _Optional[int] = ..., num_bytes: _Optional[int] = ..., num_evicted: _Optional[int] = ...) -> None: ...

class NodeState(_message.Message):
    __slots__ = ("node_id", "role", "model", "engine", "host", "pid", "draining", "num_blocks", "block_size", "max_num_seqs", "num_attempts", "load", "transfer_address", "transport", "attached_s", "index_stale")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_S_FIELD_NUMBER: _ClassVar[int]
    INDEX_STALE_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    role: str
    model: str
    engine: str
    host: str
    pid: int
    draining: bool
    num_blocks: int
    block_size: int
    max_num_seqs: int
    num_attempts: int
    load: _common_pb2.NodeLoad
    transfer_address: str
    transport: str
    attached_s: float
    index_stale: bool
    def __init__(self, node_id: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., draining: _Optional[bool] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., num_attempts: _Optional[int] = ..., load: _Optional[_Union[_common_pb2.NodeLoad, _Mapping]] = ..., transfer_address: _Optional[str] = ..., transport: _Optional[str] = ..., attached_s: _Optional[float] = ..., index_stale: _Optional[bool] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "max_model_len", "vocab_size", "eos_token_ids", "tokenizer_digest", "num_prefill_nodes", "num_decode_nodes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_NODES_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_NODES_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokenizer_digest: str
    num_prefill_nodes: int
    num_decode_nodes: int
    def __init__(self, name: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., tokenizer_digest: _Optional[str] = ..., num_prefill_nodes: _Optional[int] = ..., num_decode_nodes: _Optional[int] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...
