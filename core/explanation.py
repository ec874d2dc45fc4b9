"""Why a request runs where it runs: a placement with all its candidates, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.node_messages import Role
from kvrelay.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class Candidate:
    """One node as a decision saw it. The lowest `score` wins; it is the sum of `terms`, but for those that a
    policy says are shown only. All are finite.

    `objection` says why the node was out of the question, and is empty otherwise.
    """

    node_id: NodeId
    role: Role
    score: float
    terms: tuple[tuple[str, float], ...]
    objection: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The pair that was chosen, and all candidates.

    `predicted_ttft_s` counts from the placement to the first token at the router; None: the policy predicts
    no times. `pull_from` is the node, of either role, from which the chosen prefill node is to take the KV of
    the prompt's first `num_pull_tokens` tokens, as far as it has not got it; None: from nobody.
    """

    prefill_node: NodeId
    decode_node: NodeId
    candidates: Sequence[Candidate]
    policy: str
    predicted_ttft_s: float | None = None
    pull_from: NodeId | None = None
    num_pull_tokens: int = 0


@dataclass(frozen=True, slots=True)
class MeasuredRequest:
    """What a router saw of a request, so far or until its end. Seconds on the router's clock; None: not
    known, or not yet.

    Of the whole request: `state` is the ledger's (``queued``, ``prefilling``, ``handing_off``,
    ``decoding``, ``done``, ``failed``), `num_attempts` counts the placements that no node refused.
    `queue_s` is from submission to the first placement, `ttft_s` from submission to the first token at this
    router, `total_s` from submission to the end. `finish_reason` is of a request that is done. The error is
    why it failed or, else, why its last attempt that came to nothing did; empty if none did.

    Of the latest placement alone: `placed_ttft_s` from the placement to its first token at this router;
    `num_cached_tokens`, pulled ones included, `num_pulled_tokens`, `pull_s`, `pull_error`, `prefill_queue_s`
    and `prefill_compute_s` as the prefill node reported them; what the decode node said of the handoff once
    it had verified it (0 and empty before); `handoff_s` from the prefill's end to that, as the router saw
    both, and `num_held_tokens` that it had already.
    """

    state: str
    num_attempts: int
    num_prompt_tokens: int
    num_output_tokens: int
    queue_s: float
    ttft_s: float | None = None
    total_s: float | None = None
    finish_reason: FinishReason | None = None
    error_code: str = ""
    error_message: str = ""
    placed_ttft_s: float | None = None
    num_cached_tokens: int | None = None
    prefill_queue_s: float | None = None
    prefill_compute_s: float | None = None
    kv_bytes: int = 0
    kv_seconds: float = 0.0
    kv_transport: str = ""
    num_pulled_tokens: int = 0
    pull_s: float = 0.0
    pull_error: str = ""
    handoff_s: float | None = None
    num_held_tokens: int | None = None

    @property
    def itl_s(self) -> float | None:
        """Mean gap between two tokens of a request that has ended; None: it has not, or there were none."""
        if self.total_s is None or self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The latest placement of one request at one router, `placed_ago_s` seconds ago."""

    request_id: RequestId
    model: str
    placed_ago_s: float
    decision: Decision
    measured: MeasuredRequest
    router_id: str = ""
