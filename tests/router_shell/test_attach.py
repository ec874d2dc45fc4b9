"""`Attach`: who may attach, what a node's loss does, and what a bad frame does not do."""

import asyncio

import grpc
import pytest

from kvrelay.codec.client_api import encode_generate
from kvrelay.codec.cluster import encode_hello, encode_node_frame
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.node_messages import (
    DrainStarted,
    KVReleased,
    NodeFrame,
    NodeLoad,
    ReleaseKV,
    Role,
    TokenBatch,
)
from kvrelay.router.config import RouterCoreConfig
from kvrelay.v1 import cluster_pb2, cluster_pb2_grpc


def node_ids(router):
    return sorted(node.description.node_id for node in router.server.shell.status().nodes)


async def attach_error(router, *frames):
    """What a stream of these first frames ends with."""
    async with grpc.aio.insecure_channel(router.address) as channel:
        call = cluster_pb2_grpc.ClusterStub(channel).Attach()
        for frame in frames:
            await call.write(frame)
        await call.done_writing()
        async with asyncio.timeout(20):
            code, trailers = await call.code(), await call.trailing_metadata()
            return from_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers))


async def test_a_node_that_says_no_hello_is_refused_naming_it(router):
    for frames in ((), (cluster_pb2.NodeFrame(),)):
        error = await attach_error(router, *frames)
        assert isinstance(error, InvalidRequest)
        assert error.field == "hello"
    assert not node_ids(router)


async def test_a_hello_out_of_bounds_is_refused_naming_its_field(router, cluster):
    await cluster.add(router.address, "p0", Role.PREFILL)
    hello = encode_hello(cluster.nodes[0].description)
    hello.hello.num_blocks = 0
    hello.hello.node_id = "bad"
    error = await attach_error(router, hello)
    assert error.field == "hello.num_blocks"
    assert node_ids(router) == ["p0"]


async def test_more_nodes_than_allowed_are_refused(make_router, cluster):
    router = await make_router(max_nodes=1)
    node = await cluster.add(router.address, "p0", Role.PREFILL)
    hello = encode_hello(node.description)
    hello.hello.node_id = "p1"
    error = await attach_error(router, hello)
    assert error.code == "OVERLOADED"
    assert "max_nodes" in error.message


async def test_a_welcome_names_the_router_and_its_times(make_router, cluster):
    router = await make_router(core=RouterCoreConfig(heartbeat_s=0.7, lease_s=9.0), router_id="r1")
    node = await cluster.add(router.address, "p0", Role.PREFILL)
    assert node.welcome.router_id == "r1"
    assert (node.welcome.heartbeat_s, node.welcome.lease_s) == (0.7, 9.0)
    assert 1 <= node.welcome.router_epoch < 2**63
    assert not node.welcome.wants_tokenizer


BAD_FRAMES = {
    "tokens.counts": cluster_pb2.NodeFrame(tokens={"attempts": [1], "first_indices": [0], "counts": [3]}),
    "reports.kind": cluster_pb2.NodeFrame(reports=[{"attempt": 1}]),
    "reports.attempt": cluster_pb2.NodeFrame(reports=[{"kv_released": {}}]),
    "hello": cluster_pb2.NodeFrame(hello={"node_id": "p0"}),
    "tokenizer.digest": cluster_pb2.NodeFrame(tokenizer={"digest": "zz"}),
    "tokenizer": cluster_pb2.NodeFrame(
        tokenizer={"digest": "a" * 64, "total_bytes": 1, "data": b"x"},
    ),
}


@pytest.mark.parametrize("field", BAD_FRAMES)
async def test_a_bad_frame_ends_that_node_alone_and_its_request_goes_on_elsewhere(
    router, pair, cluster, open_session, call, output, field
):
    bad = pair[1]
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask((1, call((6,), 9)))
    await session.until_tokens(1, 1)
    await cluster.add(router.address, "d1", Role.DECODE)
    bad.held.clear()
    bad.send_raw(BAD_FRAMES[field])
    code, details = await bad.end_status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field in details
    cluster.resume()
    await session.until_ended(1)
    assert session.tokens[1] == output((6,), 9)
    assert session.finished[1].report.decode_node == "d1"
    assert node_ids(router) == ["d1", "p0"]
    await router.until_settled()


@pytest.mark.parametrize("stage", ["prefill", "handoff", "decode"])
@pytest.mark.parametrize("lost", [Role.PREFILL, Role.DECODE])
async def test_a_dying_node_costs_a_pause_and_no_token(
    router, pair, cluster, open_session, call, output, stage, lost
):
    cluster.stop_before = stage
    session = open_session(router)
    await session.ask(*((number, call((number, 2), 12)) for number in range(1, 9)))
    await router.until(lambda: len(pair[1].held) == 8)
    if stage != "prefill":
        for number in range(1, 9):
            await session.until_tokens(number, 1)
    name = "p1" if lost is Role.PREFILL else "d1"
    spare = await cluster.add(router.address, name, lost)
    victim = pair[0] if lost is Role.PREFILL else pair[1]
    victim.held.clear()
    await victim.die()
    await router.until(lambda: victim.description.node_id not in node_ids(router))
    cluster.resume()
    await session.until_ended(*range(1, 9))
    assert not session.failed
    for number in range(1, 9):
        assert session.tokens[number] == output((number, 2), 12)
    await router.until_settled()
    assert not any(node.held for node in (*pair, spare))


async def test_a_silent_node_counts_as_lost(make_router, cluster):
    core = RouterCoreConfig(heartbeat_s=0.05, node_silence_s=0.3)
    router = await make_router(core=core)
    node = await cluster.add(router.address, "p0", Role.PREFILL)
    code, details = await node.end_status()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "silent" in details
    assert not node_ids(router)
    assert node.num_heartbeats > 0, "the router itself was not silent"


async def test_the_newest_stream_of_a_node_wins_even_with_the_same_incarnation(
    router, cluster, open_session, call, output
):
    old = await cluster.add(router.address, "p0", Role.PREFILL)
    decode = await cluster.add(router.address, "d0", Role.DECODE)
    new = await cluster.add(router.address, "p0", Role.PREFILL)
    code, _ = await old.end_status()
    assert code is grpc.StatusCode.UNAVAILABLE
    cluster.nodes.remove(old)
    session = open_session(router)
    await session.ask((1, call((2,), 5)))
    await session.until_ended(1)
    assert session.tokens[1] == output((2,), 5)
    assert node_ids(router) == ["d0", "p0"]
    assert not new.held
    assert not decode.held
    await old.close()


async def test_a_node_that_drains_gets_no_new_attempts(router, pair, cluster, open_session, call):
    pair[0].send(NodeFrame(reports=(DrainStarted(),)))
    await router.until(lambda: any(node.is_draining for node in router.server.shell.status().nodes))
    await cluster.add(router.address, "p1", Role.PREFILL)
    session = open_session(router)
    await session.ask((1, call(max_tokens=3)))
    await session.until_ended(1)
    assert session.finished[1].report.prefill_node == "p1"


async def test_reports_and_tokens_of_unknown_attempts_hurt_nobody(router, pair, open_session, call, output):
    pair[1].send(NodeFrame(TokenBatch([77], [0], [1], [5]), (KVReleased(77),), NodeLoad(num_running=3)))
    session = open_session(router)
    await session.ask((1, call((4,), 5)))
    await session.until_ended(1)
    assert session.tokens[1] == output((4,), 5)


async def test_a_node_that_does_not_read_is_given_up(make_router, cluster, open_session, call):
    router = await make_router(max_buffered_commands_per_node=4)
    await cluster.add(router.address, "p0", Role.PREFILL)
    decode = await cluster.add(router.address, "d0", Role.DECODE)
    # Nor does it write: a write that races with the stream's end would hide the status.
    decode.is_deaf = True
    cluster.stop_before = "prefill"
    session = open_session(router)
    # All at once, in one message: the writer gets no turn in between.
    await session.ask(*((number, call()) for number in range(1, 9)))
    code, details = await decode.end_status()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, details
    assert "does not read" in details


async def test_release_is_sent_for_a_live_report_of_an_attempt_that_nobody_knows(router, pair):
    frame = cluster_pb2.NodeFrame(reports=[{"attempt": 99, "reserved": {}}])
    pair[1].send_raw(frame)
    command = await pair[1].next_command(ReleaseKV)
    assert command.attempt == 99


async def test_a_whole_frame_of_a_working_node_survives_the_codec(router, pair):
    pair[1].send_raw(encode_node_frame(NodeFrame(load=NodeLoad(num_running=5))))
    await router.until(
        lambda: any(node.load and node.load.num_running == 5 for node in router.server.shell.status().nodes)
    )


async def test_a_request_waits_for_the_missing_role(router, cluster, call, output):
    await cluster.add(router.address, "p0", Role.PREFILL)
    stream = router.stub.Generate(encode_generate(call((1, 1), 4)))
    assert (await stream.read()).WhichOneof("kind") == "accepted"
    await cluster.add(router.address, "d0", Role.DECODE)
    ids = []
    while (response := await stream.read()) is not grpc.aio.EOF:
        ids += response.tokens.token_ids
    assert ids == output((1, 1), 4)
