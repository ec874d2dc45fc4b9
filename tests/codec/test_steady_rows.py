"""Rows that come again are not sent again, and what is decoded is what was meant all the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.codec.client_api import SessionUpdateDecoder, SessionUpdateEncoder, decode_session_update
from kvrelay.codec.cluster import TokenBatchDecoder, TokenBatchEncoder, decode_token_batch
from kvrelay.codec.row_sets import MAX_ROW_SETS
from kvrelay.core.client_types import SessionUpdate
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.node_messages import TokenBatch
from kvrelay.core.request import TokenLogprobs
from kvrelay.v1 import cluster_pb2, router_pb2

ENTRY = TokenLogprobs(-1.5)


def send_batch(encoder, decoder, batch):
    pb = cluster_pb2.TokenBatch.FromString(encoder.encode(batch).SerializeToString())
    return decoder.decode(pb), pb


def columns_of(batch):
    columns = (batch.attempts, batch.first_indices, batch.counts, batch.token_ids, batch.logprobs)
    return [list(column) for column in columns]


@st.composite
def streams_of_batches(draw):
    """Steps of a node, some of which change something about the rows."""
    batches, rows = [], [(7, 3, 1), (8, 5, 2)]
    for _ in range(draw(st.integers(1, 12))):
        change = draw(st.sampled_from(["none", "none", "skip", "drop", "swap", "count", "empty"]))
        if change == "skip" and rows:
            rows[0] = (rows[0][0], rows[0][1] + 1, rows[0][2])
        elif change == "drop":
            rows = rows[1:] or [(9, 0, 1)]
        elif change == "swap":
            rows = rows[::-1]
        elif change == "count" and rows:
            rows[-1] = (*rows[-1][:2], 3 - min(rows[-1][2], 2))
        elif change == "empty":
            rows = []
        attempts, firsts, counts = ([row[column] for row in rows] for column in range(3))
        token_ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=sum(counts), max_size=sum(counts)))
        logprobs = (ENTRY,) * len(token_ids) if draw(st.booleans()) else ()
        batches.append(TokenBatch(attempts, firsts, counts, token_ids, logprobs))
        rows = [(attempt, first + count, count) for attempt, first, count in rows]
    return batches


@settings(deadline=None)
@given(streams_of_batches())
def test_every_step_of_a_stream_survives_the_wire_whatever_changes_between_two(batches):
    encoder, decoder = TokenBatchEncoder(), TokenBatchDecoder()
    decoded = [send_batch(encoder, decoder, batch)[0] for batch in batches]
    # Compared at the end: a later step must not change an earlier one.
    assert [columns_of(batch) for batch in decoded] == [columns_of(batch) for batch in batches]


def test_a_step_of_the_same_rows_goes_by_its_token_ids_and_shares_its_columns():
    encoder, decoder = TokenBatchEncoder(), TokenBatchDecoder()
    first, _ = send_batch(encoder, decoder, TokenBatch([7, 8], [3, 5], [1, 2], [10, 20, 21]))
    second, pb = send_batch(encoder, decoder, TokenBatch([7, 8], [4, 7], [1, 2], [11, 22, 23]))
    assert pb == cluster_pb2.TokenBatch(same_rows=True, token_ids=[11, 22, 23])
    assert second.is_next_step_of(first)
    assert not second.is_next_step_of(second)
    assert list(second.first_indices) == [4, 7]


@pytest.mark.parametrize(
    "batch",
    [
        TokenBatch([7, 9], [4, 6], [1, 1], [1, 2]),
        TokenBatch([7, 8], [4, 7], [1, 1], [1, 2]),
        TokenBatch([7, 8], [3, 5], [1, 1], [1, 2]),
        TokenBatch([7, 8], [4, 6], [1, 2], [1, 2, 3]),
        TokenBatch([7], [4], [1], [1]),
    ],
)
def test_rows_that_differ_in_anything_are_sent(batch):
    encoder, decoder = TokenBatchEncoder(), TokenBatchDecoder()
    send_batch(encoder, decoder, TokenBatch([7, 8], [3, 5], [1, 1], [10, 20]))
    decoded, pb = send_batch(encoder, decoder, batch)
    assert not pb.same_rows
    assert columns_of(decoded) == columns_of(batch)


def test_a_new_stream_knows_nothing_of_the_rows_of_the_one_before():
    batch, following = TokenBatch([7], [3], [1], [10]), TokenBatch([7], [4], [1], [11])
    encoder, decoder = TokenBatchEncoder(), TokenBatchDecoder()
    send_batch(encoder, decoder, batch)
    pb = encoder.encode(following)
    assert pb.same_rows
    for decode in (TokenBatchDecoder().decode, decode_token_batch):
        with pytest.raises(InvalidRequest) as refusal:
            decode(pb)
        assert refusal.value.field == "tokens.same_rows"
    assert not TokenBatchEncoder().encode(following).same_rows


@pytest.mark.parametrize(
    ("field", "pb"),
    [
        ("tokens.token_ids", cluster_pb2.TokenBatch(same_rows=True, token_ids=[1])),
        ("tokens.token_ids", cluster_pb2.TokenBatch(same_rows=True, token_ids=[1, 2, 3])),
        ("tokens.token_ids", cluster_pb2.TokenBatch(same_rows=True, token_ids=[1, 2**31])),
        ("tokens.same_rows", cluster_pb2.TokenBatch(same_rows=True, token_ids=[1, 2], attempts=[7, 8])),
        ("tokens.same_rows", cluster_pb2.TokenBatch(same_rows=True, token_ids=[1, 2], counts=[1, 1])),
        ("tokens.same_rows", cluster_pb2.TokenBatch(same_rows=True, token_ids=[1, 2], first_indices=[4, 6])),
    ],
)
def test_a_step_that_does_not_fit_the_rows_before_is_refused(field, pb):
    encoder, decoder = TokenBatchEncoder(), TokenBatchDecoder()
    send_batch(encoder, decoder, TokenBatch([7, 8], [3, 5], [1, 1], [10, 20]))
    with pytest.raises(InvalidRequest) as refusal:
        decoder.decode(pb)
    assert refusal.value.field == field


# ---- sessions ---------------------------------------------------------------------------------------


def send_update(encoder, decoder, update):
    pb = router_pb2.SessionResponse.FromString(encoder.encode(update).SerializeToString())
    return decoder.decode(pb), pb


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, MAX_ROW_SETS + 3), st.booleans()), max_size=60))
def test_every_message_of_a_session_survives_the_wire_whatever_rows_take_turns(turns):
    encoder, decoder = SessionUpdateEncoder(), SessionUpdateDecoder()
    rows = [([number // 2], [1 + number % 2]) for number in range(MAX_ROW_SETS + 4)]
    for turn, (number, has_logprobs) in enumerate(turns):
        token_ids = [turn, 5][: 1 + number % 2]
        logprobs = (ENTRY, None)[: len(token_ids)] if has_logprobs else ()
        update = SessionUpdate(*rows[number], token_ids, logprobs)
        assert send_update(encoder, decoder, update)[0] == update


def test_the_rows_of_several_nodes_that_take_turns_are_sent_once_each():
    encoder, decoder = SessionUpdateEncoder(), SessionUpdateDecoder()
    nodes = [([1, 2], [1, 1]), ([3, 4], [1, 1]), ([5, 6], [1, 1])]
    for turn in range(3):
        for rows in nodes:
            decoded, pb = send_update(encoder, decoder, SessionUpdate(*rows, [turn, 9]))
            assert (list(pb.stream_ids) == []) == (turn > 0)
            assert (decoded.stream_ids, decoded.counts, decoded.token_ids) == (*rows, [turn, 9])


def test_answers_and_tokens_share_a_message_of_known_rows():
    encoder, decoder = SessionUpdateEncoder(), SessionUpdateDecoder()
    rows = ([1], [1])
    send_update(encoder, decoder, SessionUpdate(*rows, [5]))
    update = SessionUpdate(*rows, [6], failed=[(2, InvalidRequest("no", field="model"))])
    decoded, pb = send_update(encoder, decoder, update)
    assert not pb.stream_ids
    assert decoded.token_ids == [6]
    assert [(stream_id, error.field) for stream_id, error in decoded.failed] == [(2, "model")]
    without_tokens, pb = send_update(encoder, decoder, SessionUpdate())
    assert pb == router_pb2.SessionResponse()
    assert without_tokens == SessionUpdate([], [], [])


@pytest.mark.parametrize(
    ("field", "pb"),
    [
        ("row_set", router_pb2.SessionResponse(row_set=2, token_ids=[1])),
        ("counts", router_pb2.SessionResponse(row_set=1, token_ids=[1, 2])),
        ("counts", router_pb2.SessionResponse(row_set=1)),
        ("counts", router_pb2.SessionResponse(token_ids=[1])),
        ("counts", router_pb2.SessionResponse(row_set=1, counts=[1], token_ids=[1])),
        ("token_ids", router_pb2.SessionResponse(row_set=1, token_ids=[2**31])),
        (
            "row_set",
            router_pb2.SessionResponse(row_set=MAX_ROW_SETS + 1, stream_ids=[1], counts=[1], token_ids=[1]),
        ),
    ],
)
def test_a_message_whose_rows_are_not_known_is_refused(field, pb):
    encoder, decoder = SessionUpdateEncoder(), SessionUpdateDecoder()
    send_update(encoder, decoder, SessionUpdate([1], [1], [5]))
    with pytest.raises(InvalidRequest) as refusal:
        decoder.decode(pb)
    assert refusal.value.field == field


def test_a_new_session_knows_nothing_of_the_rows_of_the_one_before():
    encoder, update = SessionUpdateEncoder(), SessionUpdate([1], [1], [5])
    encoder.encode(update)
    pb = encoder.encode(update)
    with pytest.raises(InvalidRequest, match="row_set"):
        SessionUpdateDecoder().decode(pb)
    with pytest.raises(InvalidRequest, match="counts"):
        decode_session_update(pb)
