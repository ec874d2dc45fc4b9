"""The tokens of one engine step. The hot path: columns pass through, no object per token.

On one `Attach` stream a step whose rows are those of the step before, one further, goes by its token ids
alone: its encoder and its decoder remember the rows.
"""

from __future__ import annotations

from kvrelay.codec.bounds import MAX_TOKEN_ID
from kvrelay.codec.sampling import decode_logprobs, encode_logprobs
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.node_messages import TokenBatch
from kvrelay.v1 import cluster_pb2


class TokenBatchEncoder:
    """Encodes the batches of one stream, each of which must be sent, in order."""

    def __init__(self) -> None:
        self._last: TokenBatch | None = None

    def encode(self, batch: TokenBatch) -> cluster_pb2.TokenBatch:
        """The batch; its columns must not change afterwards."""
        last, self._last = self._last, batch
        if last is None or not _has_next_rows(batch, last):
            return encode_token_batch(batch)
        return cluster_pb2.TokenBatch(
            same_rows=True,
            token_ids=batch.token_ids,
            logprobs=encode_logprobs(batch.logprobs) if batch.logprobs else None,
        )


class TokenBatchDecoder:
    """Decodes the batches of one stream, in order."""

    def __init__(self) -> None:
        self._last: TokenBatch | None = None

    def decode(self, pb: cluster_pb2.TokenBatch) -> TokenBatch:
        """The batch; one with `same_rows` shares the columns of the batch before, see `TokenBatch.step`.

        Raises:
            InvalidRequest: columns do not fit together or are missing, or a token id is out of range.
        """
        self._last = self._decode_next_step(pb) if pb.same_rows else decode_token_batch(pb)
        return self._last

    def _decode_next_step(self, pb: cluster_pb2.TokenBatch) -> TokenBatch:
        last = self._last
        if last is None:
            raise InvalidRequest(
                "tokens.same_rows is set, and there was no batch before on this stream",
                field="tokens.same_rows",
            )
        if pb.attempts or pb.first_indices or pb.counts:
            raise InvalidRequest(
                "tokens.attempts, tokens.first_indices and tokens.counts must be empty with tokens.same_rows",
                field="tokens.same_rows",
            )
        token_ids = pb.token_ids[:]
        if len(token_ids) != len(last.token_ids):
            raise InvalidRequest(
                f"tokens.token_ids has {len(token_ids)} entries, the same rows before had"
                f" {len(last.token_ids)}",
                field="tokens.token_ids",
            )
        _check_token_ids(token_ids)
        return last.next_step(token_ids, decode_logprobs(pb.logprobs, len(token_ids)) if pb.logprobs else ())


def encode_token_batch(batch: TokenBatch) -> cluster_pb2.TokenBatch:
    """All columns."""
    return cluster_pb2.TokenBatch(
        attempts=batch.attempts,
        first_indices=batch.first_indices,
        counts=batch.counts,
        token_ids=batch.token_ids,
        logprobs=encode_logprobs(batch.logprobs) if batch.logprobs else None,
    )


def decode_token_batch(pb: cluster_pb2.TokenBatch) -> TokenBatch:
    """A batch with all its columns, as lists.

    Raises:
        InvalidRequest: columns do not fit together, or a token id is out of range.
    """
    if pb.same_rows:
        raise InvalidRequest("tokens.same_rows needs a batch before", field="tokens.same_rows")
    attempts, counts, token_ids = pb.attempts[:], pb.counts[:], pb.token_ids[:]
    first_indices = pb.first_indices[:]
    if not len(attempts) == len(first_indices) == len(counts):
        raise InvalidRequest(
            f"tokens.attempts, tokens.first_indices and tokens.counts have {len(attempts)},"
            f" {len(first_indices)} and {len(counts)} entries; they must have as many",
            field="tokens.counts",
        )
    if 0 in counts or sum(counts) != len(token_ids):
        raise InvalidRequest(
            f"tokens.counts must be at least 1 each and add up to the {len(token_ids)} tokens.token_ids",
            field="tokens.counts",
        )
    _check_token_ids(token_ids)
    logprobs = decode_logprobs(pb.logprobs, len(token_ids)) if pb.logprobs else ()
    return TokenBatch(attempts, first_indices, counts, token_ids, logprobs)


def _check_token_ids(token_ids: list[int]) -> None:
    if token_ids and max(token_ids) > MAX_TOKEN_ID:
        raise InvalidRequest(
            f"tokens.token_ids holds {max(token_ids)}, at most {MAX_TOKEN_ID}", field="tokens.token_ids"
        )


def _has_next_rows(batch: TokenBatch, last: TokenBatch) -> bool:
    return (
        bool(batch.attempts)
        and batch.attempts == last.attempts
        and batch.counts == last.counts
        and batch.first_indices == last.next_step(()).first_indices
    )
