"""The tokens of one engine step. The hot path: columns pass through, no object per token."""

from __future__ import annotations

from kvrelay.codec.bounds import MAX_TOKEN_ID
from kvrelay.codec.sampling import decode_logprobs, encode_logprobs
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.node_messages import TokenBatch
from kvrelay.v1 import cluster_pb2


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
    """All columns, as lists.

    Raises:
        InvalidRequest: columns do not fit together, or a token id is out of range.
    """
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
    if token_ids and max(token_ids) > MAX_TOKEN_ID:
        raise InvalidRequest(
            f"tokens.token_ids holds {max(token_ids)}, at most {MAX_TOKEN_ID}", field="tokens.token_ids"
        )
    logprobs = decode_logprobs(pb.logprobs, len(token_ids)) if pb.logprobs else ()
    return TokenBatch(attempts, first_indices, counts, token_ids, logprobs)
