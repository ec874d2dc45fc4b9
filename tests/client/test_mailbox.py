"""What a session leaves for a reader arrives whole, in order and bounded."""

from __future__ import annotations

import asyncio

from kvrelay.client.mailbox import AttemptFailed, Mailbox
from kvrelay.core.client_types import CallFinished
from kvrelay.core.errors import DeadlineExceeded
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.core.request_report import RequestReport

REPORT = RequestReport("p", "d", 1, 1, 1, 0, 0.0, 0.0, 0.0, 0, 0, 0.0, "")
FINISHED = CallFinished(FinishReason.STOP, REPORT)
LATE = AttemptFailed(DeadlineExceeded("late"), is_final=True)


async def test_what_came_before_the_reader_comes_in_one_delivery() -> None:
    mailbox = Mailbox(10)
    mailbox.put_tokens([1, 2], (), 0.5)
    mailbox.put_tokens([3], (), 0.7)
    delivery = await mailbox.take()
    assert (delivery.token_ids, delivery.arrivals_s, delivery.end) == ([1, 2, 3], [0.5, 0.5, 0.7], None)


async def test_a_good_end_that_came_in_time_beats_a_later_deadline() -> None:
    mailbox = Mailbox(10)
    mailbox.put_tokens([1], (), 0.0)
    mailbox.put_end(FINISHED)
    mailbox.put_end(LATE)
    delivery = await mailbox.take()
    assert (delivery.token_ids, delivery.end) == ([1], FINISHED)


async def test_a_reader_is_woken_and_a_cancelled_one_loses_nothing() -> None:
    mailbox = Mailbox(10)
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    assert mailbox.has_reader
    reader.cancel()
    await asyncio.wait([reader])
    assert not mailbox.has_reader
    mailbox.put_tokens([7], (), 0.0)
    assert (await mailbox.take()).token_ids == [7]


async def test_a_full_mailbox_takes_nothing_more() -> None:
    mailbox = Mailbox(3)
    assert mailbox.put_tokens([1, 2], (), 0.0)
    assert not mailbox.put_tokens([3, 4], (), 0.0)
    assert mailbox.put_tokens([3], (), 0.0)
    assert (await mailbox.take()).token_ids == [1, 2, 3]
    assert mailbox.put_tokens([4, 5, 6], (), 0.0)


async def test_logprobs_stay_with_their_tokens() -> None:
    mailbox, entry = Mailbox(10), TokenLogprobs(-1.0)
    mailbox.put_tokens([1], (), 0.0)
    mailbox.put_tokens([2], [entry], 0.0)
    mailbox.put_tokens([3], (), 0.0)
    assert (await mailbox.take()).logprobs == [None, entry, None]
