"""Strategies that draw every value the codec can carry."""

import pytest
from hypothesis import strategies as st

from kvrelay.core.client_types import (
    CallAccepted,
    CallFinished,
    CallTokens,
    GenerateCall,
    SessionAsk,
    SessionUpdate,
)
from kvrelay.core.cluster_view import ClusterState, IndexState, ModelInfo, NodeState, QueueState
from kvrelay.core.errors import error_from_code
from kvrelay.core.explanation import Candidate, Decision, Explanation, MeasuredRequest
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    DrainStarted,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    NodeFrame,
    NodeLoad,
    PrefillFinished,
    PullOrder,
    ReleaseKV,
    Reserved,
    ReserveDecode,
    Role,
    RouterFrame,
    SendKVSnapshot,
    SendPrefix,
    StartDrain,
    StartPrefill,
    StopPull,
    TokenBatch,
    Welcome,
)
from kvrelay.core.request import FinishReason, Prefix, TokenLogprobs, TokenRequest
from kvrelay.core.request_report import RequestReport
from kvrelay.core.sampling import Grammar, GrammarKind, SamplingParams
from kvrelay.core.service_terms import Priority, ServiceTerms
from kvrelay.core.tokenizer_chunk import TokenizerChunk

PRINTABLE = st.characters(exclude_categories=("C", "Z"))
COUNT = st.integers(0, 2**31 - 1)
UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
SECONDS = st.floats(0, 1e9, allow_nan=False)
FLOAT32 = st.floats(width=32, allow_nan=False)
TOKEN_ID = st.integers(0, 2**31 - 1)
ATTEMPT = st.integers(1, 2**64 - 1)
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
SPAN = st.integers(1, 2**31 - 1)


def words(max_size=32, min_size=0):
    return st.text(PRINTABLE, min_size=min_size, max_size=max_size)


def some(strategy, max_size=6):
    return st.lists(strategy, max_size=max_size)


LOGPROBS = st.none() | st.builds(
    TokenLogprobs, FLOAT32, st.lists(st.tuples(TOKEN_ID, FLOAT32), max_size=20).map(tuple)
)
GRAMMAR = st.just(Grammar(GrammarKind.JSON_OBJECT)) | st.builds(
    Grammar,
    st.sampled_from([kind for kind in GrammarKind if kind is not GrammarKind.JSON_OBJECT]),
    st.text(st.characters(codec="utf-8"), min_size=1),
)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(16, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_k=COUNT,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(TOKEN_ID, max_size=64).map(tuple),
    ignore_eos=st.booleans(),
    num_logprobs=st.none() | st.integers(0, 20),
    min_tokens=st.integers(0, 16),
    logit_bias=st.lists(st.tuples(TOKEN_ID, st.floats(-100, 100)), unique_by=lambda pair: pair[0]).map(tuple),
    grammar=st.none() | GRAMMAR,
)


@st.composite
def token_requests(draw):
    ids = draw(st.lists(TOKEN_ID, min_size=1, max_size=16))
    num_prompt = draw(st.integers(1, len(ids)))
    return TokenRequest(tuple(ids), num_prompt, draw(SAMPLING), draw(st.binary(max_size=256)))


@st.composite
def columns(draw):
    """Entries of 1 to 3 tokens: (keys, counts, token ids, logprobs)."""
    counts = draw(some(st.integers(1, 3)))
    keys = draw(st.lists(UINT32, min_size=len(counts), max_size=len(counts)))
    ids = draw(st.lists(TOKEN_ID, min_size=sum(counts), max_size=sum(counts)))
    logprobs = draw(st.just([]) | st.lists(LOGPROBS, min_size=len(ids), max_size=len(ids)))
    return keys, counts, ids, logprobs


@st.composite
def token_batches(draw):
    keys, counts, ids, logprobs = draw(columns())
    indices = draw(st.lists(UINT32, min_size=len(keys), max_size=len(keys)))
    return TokenBatch(keys, indices, counts, ids, tuple(logprobs))


REPORT = st.one_of(
    st.builds(Reserved, ATTEMPT, COUNT),
    st.builds(PrefillFinished, ATTEMPT, COUNT, SECONDS, SECONDS, COUNT, SECONDS, words()),
    st.builds(HandoffVerified, ATTEMPT, UINT64, COUNT, SECONDS, words()),
    st.builds(AttemptRefused, ATTEMPT, words(min_size=1), words(), words()),
    st.builds(AttemptFinished, ATTEMPT, st.sampled_from(FinishReason)),
    st.builds(AttemptFailed, ATTEMPT, words(min_size=1), words(), words()),
    st.builds(KVReleased, ATTEMPT),
    st.builds(DrainStarted),
)
LOAD = st.builds(NodeLoad, *[COUNT] * 15)
CHUNK = st.builds(TokenizerChunk, DIGEST, st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.binary())
KV_EVENT = st.builds(
    KVEvent,
    st.integers(1, 2**64 - 1),
    COUNT,
    st.builds(KVChanges, *[some(UINT64)] * 4, cleared=st.booleans()),
    st.integers(0, 9),
    st.integers(10, 2**31 - 1),
)
NODE_FRAME = st.builds(
    NodeFrame,
    st.none() | token_batches(),
    some(REPORT).map(tuple),
    st.none() | LOAD,
    st.none() | CHUNK,
    st.none() | KV_EVENT,
)


@st.composite
def start_prefills(draw):
    request = draw(token_requests())
    pull = st.builds(PullOrder, ATTEMPT, st.integers(1, len(request.token_ids)))
    return StartPrefill(draw(ATTEMPT), request, draw(words(min_size=1)), draw(st.none() | pull))


PREFIX = st.builds(Prefix, st.lists(TOKEN_ID, min_size=1, max_size=16).map(tuple), st.binary(max_size=256))
COMMAND = st.one_of(
    start_prefills(),
    st.builds(ReserveDecode, ATTEMPT, token_requests()),
    st.builds(SendPrefix, ATTEMPT, PREFIX, words(min_size=1)),
    st.builds(StopPull, ATTEMPT),
    st.builds(ReleaseKV, ATTEMPT),
    st.builds(SendKVSnapshot),
    st.builds(StartDrain),
)
ROUTER_FRAME = st.builds(RouterFrame, some(COMMAND, 3).map(tuple))
WELCOME = st.builds(
    Welcome,
    words(),
    st.integers(1, 2**63 - 1),
    st.floats(0.01, 1e6),
    st.floats(0.01, 1e6),
    st.booleans(),
)
HELLO = st.builds(
    NodeDescription,
    node_id=words(min_size=1),
    incarnation=UINT64,
    role=st.sampled_from(Role),
    model=words(min_size=1),
    engine=words(min_size=1),
    fingerprint=st.builds(
        KVFingerprint,
        words(min_size=1),
        words(min_size=1),
        *[st.integers(1, 1 << 20)] * 3,
        words(),
    ),
    vocab_size=SPAN,
    max_model_len=st.integers(2, 2**31 - 1),
    num_blocks=SPAN,
    block_size=st.integers(1, 1 << 20),
    max_num_seqs=st.integers(1, 1 << 20),
    eos_token_ids=some(TOKEN_ID).map(tuple),
    transfer_address=words(min_size=1),
    transport=words(),
    tokenizer_digest=st.just("") | DIGEST,
    host=words(),
    pid=COUNT,
    version=words(),
)
TIMEOUT_S = st.none() | st.floats(0.001, 86_400)
TERMS = st.builds(ServiceTerms, st.sampled_from(Priority), words(), TIMEOUT_S)
CALL = st.builds(GenerateCall, words(), words(), token_requests(), TIMEOUT_S, TERMS)
RUN_REPORT = st.builds(
    RequestReport,
    prefill_node=words(),
    decode_node=words(),
    num_attempts=COUNT,
    num_prompt_tokens=COUNT,
    num_output_tokens=COUNT,
    num_cached_tokens=COUNT,
    queue_s=SECONDS,
    ttft_s=SECONDS,
    total_s=SECONDS,
    kv_bytes=UINT64,
    kv_messages=COUNT,
    kv_seconds=SECONDS,
    kv_transport=words(),
    num_pulled_tokens=COUNT,
)
ACCEPTED = st.builds(CallAccepted, words(min_size=1), st.none() | st.integers(0, 2**63 - 1))
FINISHED = st.builds(CallFinished, st.sampled_from(FinishReason), RUN_REPORT)


@st.composite
def call_tokens(draw):
    _, _, ids, logprobs = draw(columns())
    return CallTokens(tuple(ids), tuple(logprobs))


CALL_EVENT = ACCEPTED | FINISHED | call_tokens()
ASK = st.builds(
    SessionAsk,
    some(st.tuples(UINT32, CALL), 3).map(tuple),
    some(UINT32).map(tuple),
    some(UINT32).map(tuple),
)


@st.composite
def session_updates(draw):
    keys, counts, ids, logprobs = draw(columns())
    return SessionUpdate(
        keys,
        counts,
        ids,
        tuple(logprobs),
        draw(some(st.tuples(UINT32, ACCEPTED))),
        draw(some(st.tuples(UINT32, FINISHED))),
    )


CODES = (
    "INVALID_REQUEST",
    "CONTEXT_LENGTH_EXCEEDED",
    "UNKNOWN_MODEL",
    "UNKNOWN_REQUEST",
    "UNKNOWN_NODE",
    "DUPLICATE_REQUEST",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "NODE_UNAVAILABLE",
    "ROUTER_UNAVAILABLE",
    "OVERLOADED",
    "TRANSFER_FAILED",
    "KV_LAYOUT_MISMATCH",
    "ENGINE_FAILED",
    "INTERNAL",
)
ERROR = st.builds(
    error_from_code,
    st.sampled_from(CODES),
    words(min_size=1),
    field=st.none() | words(min_size=1),
    retry_after_s=st.none() | st.integers(0, 86_400_000).map(lambda ms: ms / 1000),
)
NODE_STATE = st.builds(
    NodeState,
    node_id=words(min_size=1),
    role=st.sampled_from(Role),
    model=words(),
    engine=words(),
    host=words(),
    pid=COUNT,
    draining=st.booleans(),
    num_blocks=COUNT,
    block_size=COUNT,
    max_num_seqs=COUNT,
    num_attempts=COUNT,
    load=st.none() | LOAD,
    transfer_address=words(),
    transport=words(),
    attached_s=SECONDS,
    index_stale=st.booleans(),
)
CLUSTER = st.builds(
    ClusterState,
    words(),
    words(),
    SECONDS,
    some(NODE_STATE).map(tuple),
    st.dictionaries(words(), UINT32, max_size=4),
    st.dictionaries(words(), UINT64, max_size=4),
    some(words()).map(tuple),
    st.builds(IndexState, *[UINT64] * 4),
    some(
        st.builds(
            QueueState,
            st.sampled_from(Priority),
            UINT32,
            UINT32,
            st.dictionaries(words(), UINT64, max_size=4),
        )
    ).map(tuple),
)
MODEL = st.builds(
    ModelInfo,
    words(min_size=1),
    SPAN,
    SPAN,
    some(TOKEN_ID).map(tuple),
    st.just("") | DIGEST,
    COUNT,
    COUNT,
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
CANDIDATE = st.builds(
    Candidate,
    words(min_size=1),
    st.sampled_from(Role),
    FINITE,
    some(st.tuples(words(), FINITE)).map(tuple),
    words(),
)
MEASURED = st.builds(
    MeasuredRequest,
    state=words(min_size=1),
    num_attempts=COUNT,
    num_prompt_tokens=COUNT,
    num_output_tokens=COUNT,
    queue_s=SECONDS,
    ttft_s=st.none() | SECONDS,
    total_s=st.none() | SECONDS,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    error_code=words(),
    error_message=words(),
    placed_ttft_s=st.none() | SECONDS,
    num_cached_tokens=st.none() | COUNT,
    prefill_queue_s=st.none() | SECONDS,
    prefill_compute_s=st.none() | SECONDS,
    kv_bytes=UINT64,
    kv_seconds=SECONDS,
    kv_transport=words(),
    handoff_s=st.none() | SECONDS,
    num_held_tokens=st.none() | COUNT,
    num_pulled_tokens=COUNT,
    pull_s=SECONDS,
    pull_error=words(),
)
EXPLANATION = st.builds(
    Explanation,
    words(min_size=1),
    words(),
    SECONDS,
    st.builds(
        Decision,
        words(min_size=1),
        words(min_size=1),
        some(CANDIDATE).map(tuple),
        words(),
        st.none() | SECONDS,
        st.none() | words(min_size=1),
        COUNT,
    ),
    MEASURED,
    words(),
    st.none() | SECONDS,
    st.none() | SECONDS,
)

STRATEGIES = {
    "token_batch": token_batches(),
    "node_frame": NODE_FRAME,
    "router_frame": ROUTER_FRAME,
    "welcome": WELCOME,
    "hello": HELLO,
    "sampling": SAMPLING,
    "token_request": token_requests(),
    "generate": CALL,
    "call_event": CALL_EVENT,
    "session_ask": ASK,
    "session_update": session_updates(),
    "cluster_state": CLUSTER,
    "explanation": EXPLANATION,
    "models": some(MODEL).map(tuple),
    "tokenizer_chunk": CHUNK,
}


@pytest.fixture(scope="session")
def strategies():
    return STRATEGIES


@pytest.fixture(scope="session")
def errors_strategy():
    return ERROR
