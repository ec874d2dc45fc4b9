"""The outbox of a client stream: merges what waits, loses nothing unnoticed, stays bounded."""

import asyncio

import pytest

from kvrelay.codec.client_api import SessionUpdateDecoder, SessionUpdateEncoder
from kvrelay.core.client_types import CallAccepted, CallFinished
from kvrelay.core.errors import Overloaded
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.core.request_report import RequestReport
from kvrelay.router.events import DeliverTokens
from kvrelay.router.session_outbox import SessionOutbox

REPORT = RequestReport("p", "d", 1, 1, 1, 0, 0.0, 0.0, 0.0, 0, 0, 0.0, "")


@pytest.fixture
def outbox():
    return SessionOutbox(max_buffered_tokens=10, max_buffered_answers=2)


def tokens(stream_id, *ids, logprobs=()):
    return DeliverTokens(1, [stream_id], [len(ids)], list(ids), list(logprobs))


async def test_what_waits_is_merged_into_one_update(outbox):
    assert outbox.put_tokens(tokens(1, 5))
    assert outbox.put_tokens(tokens(2, 6, 7))
    assert outbox.put_tokens(tokens(1, 8))
    update = await outbox.take()
    assert (update.stream_ids, update.counts) == ([1, 2, 1], [1, 2, 1])
    assert update.token_ids == [5, 6, 7, 8]


async def test_an_update_that_was_taken_does_not_change_any_more(outbox):
    outbox.put_tokens(tokens(1, 5))
    update = await outbox.take()
    outbox.put_tokens(tokens(1, 6))
    assert update.token_ids == [5]
    assert (await outbox.take()).token_ids == [6]


async def test_rows_delivered_again_are_recognised_unless_a_slow_client_got_several_at_once(outbox):
    """The core delivers the same lists step after step: they are shared, so they must not be changed."""
    stream_ids, counts = [1, 2], [1, 1]
    encoder, decoder = SessionUpdateEncoder(), SessionUpdateDecoder()
    read, num_bare = [], 0
    for steps in ([[5, 6]], [[7, 8]], [[9, 10], [11, 12]], [[13, 14]]):
        for token_ids in steps:
            assert outbox.put_tokens(DeliverTokens(1, stream_ids, counts, token_ids))
        pb = encoder.encode(await outbox.take())
        num_bare += not pb.stream_ids
        update = decoder.decode(pb)
        assert update.counts == [1] * len(update.stream_ids)
        read += zip(update.stream_ids, update.token_ids, strict=True)
    assert read == list(zip([1, 2] * 5, range(5, 15), strict=True))
    assert num_bare == 2
    assert (stream_ids, counts) == ([1, 2], [1, 1])


async def test_a_waiting_writer_is_woken_once_there_is_something(outbox):
    writer = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    assert not writer.done()
    outbox.put_tokens(tokens(1, 5))
    assert (await writer).token_ids == [5]


async def test_logprobs_stay_with_their_tokens_when_only_some_have_them(outbox):
    entry = TokenLogprobs(-1.0)
    outbox.put_tokens(tokens(1, 5, 6))
    outbox.put_tokens(tokens(2, 7, logprobs=[entry]))
    outbox.put_tokens(tokens(1, 8))
    assert (await outbox.take()).logprobs == [None, None, entry, None]


async def test_what_does_not_fit_is_refused_whole(outbox):
    assert outbox.put_tokens(tokens(1, *range(10)))
    assert not outbox.put_tokens(tokens(1, 10))
    assert (await outbox.take()).token_ids == list(range(10))
    assert outbox.put_tokens(tokens(1, 10))


async def test_cutting_off_a_slow_reader_never_leaves_a_finished_stream_with_a_hole(outbox):
    outbox.put_accepted(1, CallAccepted("a"))
    outbox.put_tokens(tokens(1, 5))
    outbox.put_finished(1, CallFinished(FinishReason.STOP, REPORT))
    error = Overloaded("slow")
    outbox.fail_slow_streams([2, 3], error)
    update = await outbox.take()
    assert not update.token_ids
    assert not update.finished
    assert update.failed == [(1, error), (2, error), (3, error)]


async def test_a_call_that_fails_at_once_was_never_accepted(outbox):
    outbox.put_accepted(1, CallAccepted("a"))
    outbox.put_accepted(2, CallAccepted("b"))
    outbox.put_failed(2, Overloaded("x"))
    update = await outbox.take()
    assert [stream_id for stream_id, _ in update.accepted] == [1]


async def test_a_closed_outbox_gives_what_is_left_and_then_ends(outbox):
    outbox.put_tokens(tokens(1, 5))
    outbox.close()
    assert (await outbox.take()).token_ids == [5]
    assert await outbox.take() is None


async def test_a_reader_waits_while_too_many_answers_are_unsent(outbox):
    outbox.put_failed(1, Overloaded("x"))
    await outbox.has_room_for_calls()
    outbox.put_failed(2, Overloaded("x"))
    reader = asyncio.create_task(outbox.has_room_for_calls())
    await asyncio.sleep(0)
    assert not reader.done()
    await outbox.take()
    await reader
