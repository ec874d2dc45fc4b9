"""Each field out of its range is refused under its own name."""

import pytest

from kvrelay.codec import client_api, cluster
from kvrelay.codec.sampling import decode_sampling
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import MAX_KEYS_PER_EVENT
from kvrelay.core.node_messages import NodeDescription, Role
from kvrelay.core.sampling import Grammar, GrammarKind
from kvrelay.v1 import cluster_pb2, common_pb2, router_pb2


def refused_field(decode, pb):
    with pytest.raises(InvalidRequest) as refusal:
        decode(pb)
    return refusal.value.field


GENERATE_FAULTS = {
    "request_id": {"request_id": "x" * 129},
    "model": {"model": "tab\there"},
    "prompt_token_ids": {"prompt_token_ids": [2**31]},
    "output_token_ids": {"output_token_ids": [1, 2, 3], "sampling": {"max_tokens": 2}},
    "timeout_s": {"timeout_s": 0.0},
    "cache_salt": {"cache_salt": b"x" * 257},
    "priority": {"priority": 17},
    "tenant": {"tenant": "x" * 129},
    "ttft_timeout_s": {"ttft_timeout_s": -1.0},
    "sampling.max_tokens": {"sampling": {"max_tokens": 0}},
    "sampling.temperature": {"sampling": {"temperature": float("nan")}},
    "sampling.top_k": {"sampling": {"top_k": 2**31}},
    "sampling.top_p": {"sampling": {"top_p": 0.0}},
    "sampling.min_p": {"sampling": {"min_p": 1.5}},
    "sampling.repetition_penalty": {"sampling": {"repetition_penalty": 0.0}},
    "sampling.presence_penalty": {"sampling": {"presence_penalty": 3.0}},
    "sampling.frequency_penalty": {"sampling": {"frequency_penalty": -3.0}},
    "sampling.seed": {"sampling": {"seed": 2**63}},
    "sampling.stop_token_ids": {"sampling": {"stop_token_ids": range(65)}},
    "sampling.num_logprobs": {"sampling": {"num_logprobs": 21}},
}


SAMPLING_FAULTS = [
    ("min_tokens", {"max_tokens": 4, "min_tokens": 5}),
    ("logit_bias", {"logit_bias_token_ids": [1, 2], "logit_biases": [0.5]}),
    ("logit_bias", {"logit_bias_token_ids": [1], "logit_biases": [100.5]}),
    ("logit_bias", {"logit_bias_token_ids": [1], "logit_biases": [float("nan")]}),
    ("logit_bias", {"logit_bias_token_ids": [2**31], "logit_biases": [1.0]}),
    ("logit_bias", {"logit_bias_token_ids": [7, 7], "logit_biases": [1.0, 2.0]}),
    ("logit_bias", {"logit_bias_token_ids": range(1025), "logit_biases": [1.0] * 1025}),
    ("grammar", {"grammar": {"source": "a"}}),
    ("grammar", {"grammar": {"kind": 77, "source": "a"}}),
    ("grammar", {"grammar": {"kind": "GRAMMAR_KIND_REGEX"}}),
    ("grammar", {"grammar": {"kind": "GRAMMAR_KIND_JSON_OBJECT", "source": "{}"}}),
    ("grammar", {"grammar": {"kind": "GRAMMAR_KIND_LARK", "source": "é" * (32 << 10) + "e"}}),
]


@pytest.mark.parametrize(("name", "fault"), SAMPLING_FAULTS)
def test_a_bad_sampling_field_is_named(name, fault):
    assert refused_field(decode_sampling, common_pb2.SamplingParams(**fault)) == f"sampling.{name}"


def test_parameters_at_their_limits_are_taken():
    pb = common_pb2.SamplingParams(
        max_tokens=4,
        min_tokens=4,
        logit_bias_token_ids=range(1024),
        logit_biases=[-100.0, 100.0] * 512,
        grammar={"kind": "GRAMMAR_KIND_LARK", "source": "é" * (32 << 10)},
    )
    assert len(decode_sampling(pb).logit_bias) == 1024


def test_a_grammar_that_is_no_unicode_is_refused():
    with pytest.raises(InvalidRequest) as refusal:
        Grammar(GrammarKind.REGEX, "\ud800")
    assert refusal.value.field == "sampling.grammar"


@pytest.mark.parametrize("field", GENERATE_FAULTS)
def test_a_bad_generate_field_is_named(field):
    pb = router_pb2.GenerateRequest(**{"prompt_token_ids": [1], **GENERATE_FAULTS[field]})
    assert refused_field(client_api.decode_generate, pb) == field


@pytest.mark.parametrize("timeout_s", [-1.0, float("inf"), float("nan"), 1e9])
def test_a_timeout_out_of_range_is_refused(timeout_s):
    pb = router_pb2.GenerateRequest(prompt_token_ids=[1], timeout_s=timeout_s)
    assert refused_field(client_api.decode_generate, pb) == "timeout_s"


def test_an_empty_prompt_is_refused_even_with_output():
    pb = router_pb2.GenerateRequest(output_token_ids=[1])
    assert refused_field(client_api.decode_generate, pb) == "prompt_token_ids"


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ("tokens.counts", {"attempts": [1], "first_indices": [0], "counts": []}),
        ("tokens.counts", {"attempts": [1], "first_indices": [0], "counts": [0]}),
        ("tokens.counts", {"attempts": [1], "first_indices": [0], "counts": [2], "token_ids": [5]}),
        ("tokens.token_ids", {"attempts": [1], "first_indices": [0], "counts": [1], "token_ids": [2**31]}),
        (
            "logprobs",
            {
                "attempts": [1],
                "first_indices": [0],
                "counts": [1],
                "token_ids": [5],
                "logprobs": [common_pb2.TokenLogprobs()] * 2,
            },
        ),
        (
            "logprobs.top_token_ids",
            {
                "attempts": [1],
                "first_indices": [0],
                "counts": [1],
                "token_ids": [5],
                "logprobs": [common_pb2.TokenLogprobs(present=True, top_token_ids=[1])],
            },
        ),
    ],
)
def test_token_columns_that_do_not_fit_together_are_refused(field, fault):
    assert refused_field(cluster.decode_token_batch, cluster_pb2.TokenBatch(**fault)) == field


def hello(**changes):
    node = NodeDescription(
        node_id="d0",
        incarnation=1,
        role=Role.DECODE,
        model="m",
        engine="sim",
        fingerprint=KVFingerprint("m", "float32", 2, 2, 8, "r"),
        vocab_size=100,
        max_model_len=100,
        num_blocks=10,
        block_size=16,
        max_num_seqs=4,
        transfer_address="127.0.0.1:1",
    )
    pb = cluster.encode_hello(node)
    for name, value in changes.items():
        target = pb.hello
        *parents, leaf = name.split("__")
        for parent in parents:
            target = getattr(target, parent)
        if isinstance(value, list):
            getattr(target, leaf).extend(value)
        else:
            setattr(target, leaf, value)
    return pb


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node_id", ""),
        ("node_id", "a\nb"),
        ("node_id", "x" * 129),
        ("role", 0),
        ("role", 77),
        ("model", ""),
        ("engine", ""),
        ("vocab_size", 0),
        ("max_model_len", 1),
        ("num_blocks", 2**31),
        ("block_size", 0),
        ("max_num_seqs", 0),
        ("eos_token_ids", [2**31]),
        ("eos_token_ids", list(range(65))),
        ("transfer_address", ""),
        ("tokenizer_digest", "ABC"),
        ("fingerprint__num_layers", 0),
        ("fingerprint__dtype", ""),
    ],
)
def test_a_bad_hello_field_is_named(field, value):
    name = "hello." + field.replace("__", ".")
    assert refused_field(cluster.decode_hello, hello(**{field: value})) == name


def test_a_first_frame_without_hello_or_with_more_is_refused():
    assert refused_field(cluster.decode_hello, cluster_pb2.NodeFrame()) == "hello"
    crowded = hello()
    crowded.load.SetInParent()
    assert refused_field(cluster.decode_hello, crowded) == "hello"


def test_hello_and_welcome_come_once():
    assert refused_field(cluster.decode_node_frame, hello()) == "hello"
    again = cluster_pb2.RouterFrame(welcome=cluster_pb2.Welcome())
    assert refused_field(cluster.decode_router_frame, again) == "welcome"


@pytest.mark.parametrize(
    ("field", "report"),
    [
        ("reports.kind", {"attempt": 1}),
        ("reports.attempt", {"kv_released": {}}),
        ("reports.attempt_failed.code", {"attempt": 1, "attempt_failed": {"message": "x"}}),
        ("reports.attempt_finished.finish_reason", {"attempt": 1, "attempt_finished": {}}),
        ("reports.prefill_finished.queue_s", {"attempt": 1, "prefill_finished": {"queue_s": -1}}),
        ("reports.prefill_finished.pull_s", {"attempt": 1, "prefill_finished": {"pull_s": -1}}),
        ("reports.prefill_finished.pull_error", {"attempt": 1, "prefill_finished": {"pull_error": "\n"}}),
        (
            "reports.handoff_verified.seconds",
            {"attempt": 1, "handoff_verified": {"seconds": float("inf")}},
        ),
    ],
)
def test_a_bad_report_is_named(field, report):
    pb = cluster_pb2.NodeFrame(reports=[cluster_pb2.Report(**report)])
    assert refused_field(cluster.decode_node_frame, pb) == field


def start_prefill(**changes):
    request = {"token_ids": [1, 2], "num_prompt_tokens": 2}
    return {"attempt": 1, "start_prefill": {"request": request, "decode_address": "d:1", **changes}}


def send_prefix(**changes):
    return {"attempt": 1, "send_prefix": {"token_ids": [1, 2], "address": "p:1", **changes}}


@pytest.mark.parametrize(
    ("field", "command"),
    [
        ("commands.kind", {"attempt": 1}),
        ("commands.attempt", {"release_kv": {}}),
        ("commands.attempt", send_prefix() | {"attempt": 0}),
        ("commands.start_prefill.decode_address", start_prefill(decode_address="")),
        ("commands.start_prefill.num_pull_tokens", start_prefill(pull_attempt=2)),
        ("commands.start_prefill.num_pull_tokens", start_prefill(pull_attempt=2, num_pull_tokens=3)),
        ("commands.send_prefix.address", send_prefix(address="")),
        ("commands.send_prefix.token_ids", send_prefix(token_ids=[])),
        ("commands.send_prefix.token_ids", send_prefix(token_ids=[2**31])),
        ("commands.send_prefix.cache_salt", send_prefix(cache_salt=b"x" * 257)),
    ],
)
def test_a_bad_command_is_named(field, command):
    pb = cluster_pb2.RouterFrame(commands=[cluster_pb2.Command(**command)])
    assert refused_field(cluster.decode_router_frame, pb) == field


@pytest.mark.parametrize(
    ("field", "event"),
    [
        ("kv.first", {"num_parts": 1}),
        ("kv.num_batches", {"first": 1, "num_parts": 1, "num_batches": 2**31}),
        ("kv.num_parts", {"first": 1}),
        ("kv.part", {"first": 1, "part": 2, "num_parts": 2}),
        ("kv", {"first": 1, "num_parts": 1, "stored": range(MAX_KEYS_PER_EVENT), "host_removed": [1]}),
    ],
)
def test_a_bad_kv_event_is_named(field, event):
    pb = cluster_pb2.NodeFrame(kv=cluster_pb2.KVEvent(**event))
    assert refused_field(cluster.decode_node_frame, pb) == field


def test_a_malformed_call_of_a_session_becomes_an_error_for_its_stream_alone():
    pb = router_pb2.SessionRequest(
        generate=[
            {"stream_id": 1, "request": {}},
            {"stream_id": 2, "request": {"prompt_token_ids": [1]}},
        ]
    )
    (_, bad), (_, good) = client_api.decode_session_ask(pb).calls
    assert isinstance(bad, InvalidRequest)
    assert bad.field == "prompt_token_ids"
    assert good.request.token_ids == (1,)


@pytest.mark.parametrize("interval_s", [0.01, 1e6, -1.0, float("nan")])
def test_a_watch_interval_out_of_range_is_refused(interval_s):
    pb = router_pb2.WatchClusterRequest(interval_s=interval_s)
    assert refused_field(client_api.decode_watch_cluster, pb) == "interval_s"


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a\nb"])
def test_an_id_that_no_request_can_have_is_not_explained(request_id):
    pb = router_pb2.ExplainRequest(request_id=request_id)
    assert refused_field(client_api.decode_explain, pb) == "request_id"


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ("placed_ago_s", {"placed_ago_s": -1.0}),
        ("decision.decode_node", {"decision": {"decode_node": "d\t0"}}),
        ("candidates.role", {"decision": {"candidates": [{"node_id": "p0", "role": "both"}]}}),
        (
            "candidates.score",
            {"decision": {"candidates": [{"node_id": "p0", "role": "prefill", "score": float("inf")}]}},
        ),
        ("measured.ttft_s", {"measured": {"state": "done", "ttft_s": float("nan")}}),
        ("measured.finish_reason", {"measured": {"state": "done", "finish_reason": 77}}),
    ],
)
def test_a_bad_field_of_an_explanation_is_named(field, fault):
    good = {
        "request_id": "r",
        "decision": {"prefill_node": "p0", "decode_node": "d0"},
        "measured": {"state": "done"},
    }
    pb = router_pb2.ExplainResponse(**good)
    pb.MergeFrom(router_pb2.ExplainResponse(**fault))
    assert refused_field(client_api.decode_explanation, pb) == field
