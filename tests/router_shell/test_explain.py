"""`Explain` on the wire: what a router says of a placement while the request lives, and afterwards."""

import grpc
import pytest

from kvrelay.codec.client_api import decode_explanation, encode_explain, encode_generate
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.node_messages import Role
from kvrelay.core.request import FinishReason
from kvrelay.router.config import RouterCoreConfig
from kvrelay.v1 import router_pb2


async def explain(router, request_id):
    return decode_explanation(await router.stub.Explain(encode_explain(request_id)))


async def refusal(router, request_id):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.stub.Explain(router_pb2.ExplainRequest(request_id=request_id))
    return caught.value.code(), from_rpc_error(caught.value)


async def read_all(stream):
    while await stream.read() is not grpc.aio.EOF:
        pass


async def test_a_placement_is_explained_while_its_request_lives_and_afterwards(router, pair, cluster, call):
    await cluster.add(router.address, "d1", Role.DECODE, num_blocks=1)
    cluster.stop_before = "handoff"
    stream = router.stub.Generate(encode_generate(call(range(1, 21), 6, "r1")))
    await stream.read()
    await stream.read()  # the first token
    live = await explain(router, "r1")
    assert (live.request_id, live.model, live.measured.finish_reason) == ("r1", "m", None)
    assert live.router_id.endswith(f":{router.server.grpc_port}")
    assert live.measured.num_output_tokens == 1
    assert live.measured.placed_ttft_s >= 0
    cluster.resume()
    await read_all(stream)
    ended = await explain(router, "r1")
    assert ended.decision == live.decision
    assert (ended.decision.prefill_node, ended.decision.decode_node) == ("p0", "d0")
    candidates = {candidate.node_id: candidate for candidate in ended.decision.candidates}
    terms = dict(candidates["p0"].terms)
    assert {"queue_s", "pull_s", "prefill_s", "others_s", "cached_tokens"} <= set(terms)
    assert {"handoff_s", "decode_s", "itl_s", "held_tokens"} <= {name for name, _ in candidates["d0"].terms}
    assert candidates["d1"].role is Role.DECODE
    assert candidates["d1"].objection == "the sequence is too long for it"
    assert ended.decision.predicted_ttft_s > 0
    measured = ended.measured
    assert (measured.state, measured.finish_reason) == ("done", FinishReason.LENGTH)
    assert (measured.num_output_tokens, measured.num_attempts, measured.num_cached_tokens) == (6, 1, 0)
    assert measured.ttft_s == live.measured.ttft_s
    assert measured.total_s >= measured.ttft_s
    assert (measured.kv_bytes, measured.kv_transport) == (1000, "fake")
    assert ended.placed_ago_s >= measured.total_s - measured.queue_s


async def test_an_id_that_is_not_remembered_is_not_found_and_the_answer_says_how_many_are(
    make_router, cluster, call
):
    router = await make_router(core=RouterCoreConfig(num_remembered_decisions=2))
    await cluster.add(router.address, "p0", Role.PREFILL)
    await cluster.add(router.address, "d0", Role.DECODE)
    for number in range(3):
        await read_all(router.stub.Generate(encode_generate(call(request_id=f"r{number}"))))
    assert (await explain(router, "r2")).measured.state == "done"
    code, error = await refusal(router, "r0")
    assert code is grpc.StatusCode.NOT_FOUND
    assert (error.code, error.field) == ("UNKNOWN_REQUEST", "request_id")
    assert "latest 2 requests" in error.message


async def test_an_id_that_can_not_be_one_is_an_invalid_argument(router):
    code, error = await refusal(router, "")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == "request_id"


async def test_a_request_that_failed_is_explained_with_its_error(router, pair, cluster, call):
    cluster.stop_before = "prefill"
    stream = router.stub.Generate(encode_generate(call(request_id="r1")))
    await stream.read()
    await router.stub.Cancel(router_pb2.CancelRequest(request_id="r1"))
    assert await stream.code() is grpc.StatusCode.CANCELLED
    measured = (await explain(router, "r1")).measured
    assert (measured.state, measured.error_code, measured.ttft_s) == ("failed", "CANCELLED", None)
