"""`Session`: many requests on one stream, batched both ways, each failing alone."""

import asyncio

import grpc
import pytest

from kvrelay.codec.client_api import encode_generate
from kvrelay.core.errors import (
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    RouterUnavailable,
    UnknownModel,
)
from kvrelay.core.node_messages import ReleaseKV, Role
from kvrelay.core.request import FinishReason
from kvrelay.v1 import router_pb2


async def test_64_streams_get_their_own_tokens_in_order(router, pair, cluster, open_session, call, output):
    cluster.tokens_per_frame = 3
    session = open_session(router)
    calls = [(number, call((number, 7), 5 + number)) for number in range(1, 65)]
    await session.ask(*calls)
    await session.until_ended(*(number for number, _ in calls))
    assert not session.failed
    for number, _ in calls:
        assert session.tokens[number] == output((number, 7), 5 + number)
        assert session.accepted[number].request_id
        assert session.finished[number].report.num_output_tokens == 5 + number
    await router.until_settled()


async def test_a_malformed_call_fails_its_stream_alone(router, pair, open_session, call, output):
    session = open_session(router)
    bad = router_pb2.SessionGenerate(stream_id=1, request=router_pb2.GenerateRequest())
    good = router_pb2.SessionGenerate(stream_id=2, request=encode_generate(call((8,), 6)))
    await session.call.write(router_pb2.SessionRequest(generate=[bad, good]))
    await session.until_ended(1, 2)
    assert isinstance(session.failed[1], InvalidRequest)
    assert session.failed[1].field == "prompt_token_ids"
    assert 1 not in session.accepted
    assert session.tokens[2] == output((8,), 6)


async def test_a_call_the_core_refuses_fails_its_stream_alone(router, pair, open_session, call):
    session = open_session(router)
    await session.ask((1, call(model="nope")), (2, call(max_tokens=2)))
    await session.until_ended(1, 2)
    assert isinstance(session.failed[1], UnknownModel)
    assert 1 not in session.accepted
    assert 2 in session.finished


async def test_a_duplicate_stream_id_ends_that_stream_once(router, pair, cluster, open_session, call):
    cluster.stop_before = "prefill"
    session = open_session(router)
    await session.ask((1, call()), (2, call()))
    await session.ask((1, call()))
    await session.until_ended(1)
    assert isinstance(session.failed[1], DuplicateRequest)
    assert session.failed[1].field == "stream_id"
    await pair[0].next_command(ReleaseKV)
    cluster.resume()
    await session.until_ended(2)
    assert 2 in session.finished
    await router.until_settled()


async def test_cancel_ends_the_named_stream_alone(router, pair, cluster, open_session, call):
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask((1, call()), (2, call()))
    await session.until_tokens(1, 1)
    await session.ask(cancel=(1, 99))
    await session.until_ended(1)
    assert isinstance(session.failed[1], RequestCancelled)
    cluster.resume()
    await session.until_ended(2)
    assert 2 in session.finished


async def test_finish_ends_the_named_stream_well_and_frees_its_nodes(
    router, pair, cluster, open_session, call, output
):
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask((1, call((4,))), (2, call()))
    await session.until_tokens(1, 1)
    await session.ask(finish=(1, 99))
    await session.until_ended(1)
    assert session.finished[1].finish_reason is FinishReason.STOP
    assert session.finished[1].report.num_output_tokens == 1
    assert session.tokens[1] == output((4,), 1)
    await pair[1].next_command(ReleaseKV)
    cluster.resume()
    await session.until_ended(2)
    assert session.tokens[2] == output((1, 2, 3), 8)
    await router.until_settled()
    counters = router.server.shell.status().counters
    assert (counters.num_finished, counters.num_failed) == (2, 0)


async def test_a_call_may_be_sent_and_finished_in_one_message(router, pair, cluster, open_session, call):
    cluster.stop_before = "prefill"
    session = open_session(router)
    await session.ask((1, call()), finish=(1,))
    await session.until_ended(1)
    assert session.finished[1].report.num_output_tokens == 0
    await router.until_settled()


@pytest.mark.parametrize("how", ["half_close", "cancel"])
async def test_the_streams_end_cancels_what_is_unfinished(router, pair, cluster, open_session, call, how):
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask(*((number, call()) for number in range(1, 9)))
    for number in range(1, 9):
        await session.until_tokens(number, 1)
    if how == "cancel":
        session.call.cancel()
    else:
        await session.call.done_writing()
        assert await asyncio.wait_for(session.call.code(), 20) is grpc.StatusCode.OK
    await router.until_settled()
    assert not pair[0].held
    assert not pair[1].held
    assert not router.server.shell.sessions.by_id


async def test_bytes_that_are_no_message_end_the_session_and_free_its_requests(router, pair, cluster, call):
    cluster.stop_before = "decode"
    stream = router.channel.stream_stream(
        "/kvrelay.v1.Router/Session",
        request_serializer=lambda raw: raw,
        response_deserializer=router_pb2.SessionResponse.FromString,
    )()
    ask = router_pb2.SessionRequest(generate=[{"stream_id": 1, "request": encode_generate(call())}])
    await stream.write(ask.SerializeToString())
    while not (await stream.read()).token_ids:
        pass
    await stream.write(b"\xff\xff")
    assert await asyncio.wait_for(stream.code(), 20) is grpc.StatusCode.INVALID_ARGUMENT
    await router.until_settled()
    assert not pair[1].held


async def test_a_slow_reader_loses_its_requests_and_holds_up_nobody(
    make_router, cluster, open_session, open_narrow_session, call, output
):
    router = await make_router(max_buffered_tokens_per_session=20_000)
    await cluster.add(router.address, "p0", Role.PREFILL)
    decode = await cluster.add(router.address, "d0", Role.DECODE)
    cluster.tokens_per_frame = 3000
    slow, quick = open_narrow_session(router), open_session(router)
    numbers = range(1, 101)
    await slow.ask(*((number, call((number,), 3000)) for number in numbers))
    await router.until(lambda: router.server.shell.status().counters.num_submitted == 100)
    await router.until_settled()
    assert not decode.held
    await quick.ask((1, call((3,), 50)))
    await quick.until_ended(1)
    assert quick.tokens[1] == output((3,), 50)
    await slow.until_ended(*numbers)
    assert slow.failed
    for error in slow.failed.values():
        assert isinstance(error, Overloaded)
        assert "max_buffered_tokens_per_session (20000)" in error.message
    for number in slow.finished:
        assert slow.tokens[number] == output((number,), 3000), "what is called finished is whole"


async def test_more_streams_in_a_session_than_allowed_are_refused(make_router, cluster, open_session, call):
    router = await make_router(max_streams_per_session=2)
    await cluster.add(router.address, "p0", Role.PREFILL)
    await cluster.add(router.address, "d0", Role.DECODE)
    cluster.stop_before = "prefill"
    session = open_session(router)
    await session.ask(*((number, call()) for number in range(1, 4)))
    await session.until_ended(3)
    assert isinstance(session.failed[3], Overloaded)
    assert "max_streams_per_session" in session.failed[3].message


async def test_a_session_that_reads_no_answers_is_not_read_either(make_router, open_session, call):
    router = await make_router(max_buffered_answers_per_session=10)
    session = open_session(router)
    for first in range(0, 200, 10):
        await session.ask(*((number, call(model="")) for number in range(first, first + 10)))
    await session.until_ended(*range(200))
    assert len(session.failed) == 200


async def test_a_router_that_stops_lets_running_requests_finish_and_takes_no_new_ones(
    router, pair, cluster, open_session, call, output
):
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask((1, call((9,), 30)))
    await session.until_tokens(1, 1)
    stopping = asyncio.create_task(router.server.stop(20.0))
    await router.until(lambda: router.server.shell.is_draining)
    await session.ask((2, call()))
    await session.until_ended(2)
    assert isinstance(session.failed[2], RouterUnavailable)
    assert session.failed[2].retryable
    cluster.resume()
    await session.until_ended(1)
    assert session.tokens[1] == output((9,), 30)
    await stopping


async def test_a_router_that_runs_out_of_drain_time_hands_requests_back(
    router, pair, cluster, open_session, call
):
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask((1, call()))
    await session.until_tokens(1, 1)
    stopping = asyncio.create_task(router.server.stop(0.0))
    await session.until_ended(1)
    assert isinstance(session.failed[1], RouterUnavailable)
    await stopping
    assert not pair[1].held, "the decode node was told to release before the router left"
