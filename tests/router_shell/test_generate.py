"""`Generate` and `Cancel`: one request a stream, from its arrival to its release."""

import asyncio

import grpc
import pytest

from kvrelay.codec.client_api import encode_cancel, encode_generate
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.errors import (
    DuplicateRequest,
    InvalidRequest,
    NodeUnavailable,
    RequestCancelled,
    UnknownModel,
    UnknownRequest,
)
from kvrelay.core.node_messages import ReleaseKV, Role
from kvrelay.v1 import router_pb2

STAGES = ("prefill", "handoff", "decode")


async def collect(stream):
    kinds, ids, last = [], [], None
    while (response := await stream.read()) is not grpc.aio.EOF:
        last = response
        kinds.append(response.WhichOneof("kind"))
        ids += response.tokens.token_ids
    return kinds, ids, last


async def refusal(stream):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stream)
    return from_rpc_error(caught.value)


async def test_a_request_is_accepted_streamed_and_finished_with_its_report(router, pair, call, output):
    stream = router.stub.Generate(encode_generate(call((5, 6), 20)))
    kinds, ids, last = await collect(stream)
    assert ids == output((5, 6), 20)
    assert kinds[0] == "accepted"
    assert kinds[-1] == "finished"
    report = last.finished.report
    assert (report.prefill_node, report.decode_node, report.num_attempts) == ("p0", "d0", 1)
    assert (report.num_prompt_tokens, report.num_output_tokens) == (2, 20)
    assert (report.kv_bytes, report.kv_transport) == (1000, "fake")
    await router.until_settled()


async def test_a_single_token_request_ends_at_the_prefill_node(router, pair, call, output):
    _, ids, _ = await collect(router.stub.Generate(encode_generate(call((5,), 1))))
    assert ids == output((5,), 1)
    await router.until_settled()
    assert not pair[1].held


async def test_without_a_model_the_only_one_is_meant(router, pair, call, output):
    _, ids, _ = await collect(router.stub.Generate(encode_generate(call((5,), 3, model=""))))
    assert ids == output((5,), 3)


async def test_without_a_model_and_with_two_served_the_field_is_named(router, pair, cluster, call):
    await cluster.add(router.address, "p1", Role.PREFILL, model="other")
    error = await refusal(router.stub.Generate(encode_generate(call(model=""))))
    assert isinstance(error, InvalidRequest)
    assert error.field == "model"
    assert "m, other" in error.message


async def test_without_any_node_a_request_for_no_model_is_refused_at_once(router, call):
    assert isinstance(await refusal(router.stub.Generate(encode_generate(call(model="")))), NodeUnavailable)


async def test_an_unknown_model_is_refused_naming_what_is_served(router, pair, call):
    error = await refusal(router.stub.Generate(encode_generate(call(model="nope"))))
    assert isinstance(error, UnknownModel)
    assert "'m'" in error.message or " m" in error.message


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("prompt_token_ids", {"prompt_token_ids": []}),
        ("prompt_token_ids", {"prompt_token_ids": [5000]}),
        ("prompt_token_ids", {"prompt_token_ids": [1] * 4096}),
        ("sampling.max_tokens", {"sampling": {"max_tokens": 0}}),
        ("sampling.temperature", {"sampling": {"temperature": -1.0}}),
        ("timeout_s", {"timeout_s": -1.0}),
        ("timeout_s", {"timeout_s": 80_000.0}),
        ("request_id", {"request_id": "x" * 200}),
        ("cache_salt", {"cache_salt": b"x" * 300}),
        ("output_token_ids", {"output_token_ids": [1] * 400}),
    ],
)
async def test_a_bad_field_is_named_and_nothing_is_left(router, pair, field, change):
    request = router_pb2.GenerateRequest(**{"prompt_token_ids": [1], **change})
    error = await refusal(router.stub.Generate(request))
    assert error.field == field
    assert not router.server.shell.sessions.by_id
    await router.until_settled()
    assert pair[0].commands.empty()


async def test_bytes_that_are_no_message_are_refused_in_every_call(router):
    prefix = "/kvrelay.v1.Router/"
    for name, make in (
        ("Generate", router.channel.unary_stream),
        ("WatchCluster", router.channel.unary_stream),
        ("GetTokenizer", router.channel.unary_stream),
        ("Cancel", router.channel.unary_unary),
        ("ListModels", router.channel.unary_unary),
    ):
        call = make(prefix + name)(b"\xff\xff\xff")
        code = await asyncio.wait_for(call.code(), 20)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, name
    for method in (prefix + "Session", "/kvrelay.v1.Cluster/Attach"):
        call = router.channel.stream_stream(method)()
        await call.write(b"\xff\xff\xff")
        assert await asyncio.wait_for(call.code(), 20) is grpc.StatusCode.INVALID_ARGUMENT, method


async def test_a_sampled_request_is_told_its_seed_and_a_greedy_one_has_none(router, pair, call):
    seeds = []
    for sampling in ({}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 7}):
        stream = router.stub.Generate(encode_generate(call(max_tokens=1, **sampling)))
        accepted = (await stream.read()).accepted
        seeds.append(accepted.seed if accepted.HasField("seed") else None)
        await collect(stream)
    assert seeds[0] is None
    assert 0 <= seeds[1] < 2**63
    assert seeds[2] == 7


async def test_every_attempt_gets_the_drawn_seed(router, pair, call):
    stream = router.stub.Generate(encode_generate(call(max_tokens=4, temperature=1.0)))
    seed = (await stream.read()).accepted.seed
    start = await asyncio.wait_for(pair[0].commands.get(), 20)
    assert start.request.sampling.seed == seed
    await collect(stream)


async def test_a_request_id_is_unique_among_live_requests(router, pair, cluster, call):
    cluster.stop_before = "decode"
    first = router.stub.Generate(encode_generate(call(request_id="same")))
    assert (await first.read()).accepted.request_id == "same"
    error = await refusal(router.stub.Generate(encode_generate(call(request_id="same"))))
    assert isinstance(error, DuplicateRequest)
    cluster.resume()
    assert (await collect(first))[0][-1] == "finished"
    again = router.stub.Generate(encode_generate(call(request_id="same")))
    assert (await collect(again))[0][-1] == "finished"


@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancelled_request_frees_both_nodes_in_every_state(router, pair, cluster, call, stage):
    cluster.stop_before = stage
    stream = router.stub.Generate(encode_generate(call(request_id="x", max_tokens=9)))
    await stream.read()
    if stage != "prefill":
        assert (await stream.read()).WhichOneof("kind") == "tokens"
    await router.stub.Cancel(encode_cancel("x"))
    assert isinstance(await refusal(stream), RequestCancelled)
    await pair[1].next_command(ReleaseKV)
    await router.until_settled()
    assert not pair[0].held
    assert not pair[1].held


@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_goes_away_frees_both_nodes_in_every_state(router, pair, cluster, call, stage):
    cluster.stop_before = stage
    stream = router.stub.Generate(encode_generate(call(max_tokens=9)))
    await stream.read()
    if stage != "prefill":
        await stream.read()
    stream.cancel()
    await pair[1].next_command(ReleaseKV)
    await router.until_settled()
    assert not pair[0].held
    assert not pair[1].held
    assert not router.server.shell.sessions.by_id


async def test_cancelling_what_is_unknown_or_unnamed_is_an_error(router):
    for request, error_type in (
        (encode_cancel("nobody"), UnknownRequest),
        (encode_cancel(""), InvalidRequest),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Cancel(request)
        error = from_rpc_error(caught.value)
        assert isinstance(error, error_type)
        assert error.field == "request_id"


async def test_a_request_that_is_out_of_time_fails_with_its_deadline(router, pair, cluster, call):
    cluster.stop_before = "prefill"
    request = encode_generate(call())
    request.timeout_s = 0.05
    error = await refusal(router.stub.Generate(request))
    assert error.code == "DEADLINE_EXCEEDED"
    await pair[0].next_command(ReleaseKV)
    await router.until_settled()


async def test_what_the_client_has_already_is_continued(router, pair, call, output):
    whole = output((4, 4), 12)
    request = encode_generate(call((4, 4), 12))
    request.output_token_ids.extend(whole[:5])
    _, ids, last = await collect(router.stub.Generate(request))
    assert ids == whole[5:]
    assert last.finished.report.num_output_tokens == 12


async def test_more_client_streams_than_allowed_are_refused(make_router, cluster, call):
    router = await make_router(max_sessions=1)
    await cluster.add(router.address, "p0", Role.PREFILL)
    await cluster.add(router.address, "d0", Role.DECODE)
    cluster.stop_before = "prefill"
    first = router.stub.Generate(encode_generate(call()))
    await first.read()
    error = await refusal(router.stub.Generate(encode_generate(call())))
    assert error.code == "OVERLOADED"
    assert "max_sessions" in error.message
    assert error.retry_after_s is not None
