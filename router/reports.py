"""What a node's reports mean for the attempts they name.

A terminal report always settles its side first; only then, and only if the attempt is still its request's
current one, does the request move. That is why late reports of dead attempts need no case of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvrelay.core.errors import (
    CallerError,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    KVLayoutMismatch,
    KVRelayError,
    NodeUnavailable,
    TransferCancelled,
    TransferFailed,
    error_from_code,
)
from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    DrainStarted,
    HandoffVerified,
    KVReleased,
    PrefillFinished,
    ReleaseKV,
    Report,
    Reserved,
    Role,
)
from kvrelay.router.cluster_state import NodeState
from kvrelay.router.events import SendCommand
from kvrelay.router.ledger import Attempt, RequestState, SideState
from kvrelay.router.lifecycle import Lifecycle

_TERMINAL = (AttemptRefused, AttemptFinished, AttemptFailed, KVReleased)


def apply_reports(life: Lifecycle, node: NodeState, reports: Sequence[Report], now_s: float) -> None:
    """Bring what `node` reports at one moment into the books, in order."""
    prefilled = [report for report in reports if isinstance(report, PrefillFinished)]
    if prefilled:
        life.policy.note_prefilled(node, prefilled, now_s)
    for report in reports:
        _apply_report(life, node, report, now_s)


def _apply_report(life: Lifecycle, node: NodeState, report: Report, now_s: float) -> None:
    if isinstance(report, DrainStarted):
        life.cluster.record_drain(node, now_s)
        life.policy.note_draining(node)
        return
    attempt = node.in_flight.get(report.attempt)
    pull = node.sends.get(report.attempt)
    if pull is not None and isinstance(report, _TERMINAL):
        life.effects.extend(life.pulls.on_report(pull, report))
    elif attempt is None:
        life.counters.num_stray_reports += 1
        if not isinstance(report, _TERMINAL):
            life.effects.append(SendCommand(node.description.node_id, ReleaseKV(report.attempt)))
    elif isinstance(report, _TERMINAL):
        _apply_terminal(life, node, attempt, report, now_s)
    else:
        _apply_progress(life, node, attempt, report, now_s)


def _apply_progress(
    life: Lifecycle,
    node: NodeState,
    attempt: Attempt,
    report: Reserved | PrefillFinished | HandoffVerified,
    now_s: float,
) -> None:
    role = node.description.role
    expected_role = Role.PREFILL if isinstance(report, PrefillFinished) else Role.DECODE
    if role is not expected_role or not attempt.is_current:
        life.counters.num_stray_reports += role is not expected_role
        return
    if isinstance(report, PrefillFinished):
        _apply_prefill_finished(life, node, attempt, report, now_s)
    elif isinstance(report, HandoffVerified):
        life.policy.note_handed_over(node, report, now_s)
        attempt.is_verified = True
        attempt.entry.handoff, attempt.entry.handed_over_s = report, now_s
        _move_if_decoding(attempt)
    else:
        attempt.entry.num_held_tokens = report.num_cached_tokens


def _apply_prefill_finished(
    life: Lifecycle, node: NodeState, attempt: Attempt, report: PrefillFinished, now_s: float
) -> None:
    entry = attempt.entry
    if entry.state is not RequestState.PREFILLING:
        return
    if not attempt.has_first_token:
        fail_by_fault(life, node, attempt, "it finished a prefill without its token", now_s)
        return
    node.record_computed(attempt.prefill)
    life.has_news_for_queue = True
    entry.prefilled, entry.prefilled_s = report, now_s
    life.pulls.count(attempt, report)
    life.effects.extend(life.pulls.release(attempt, now_s))
    entry.move_to(RequestState.HANDING_OFF)
    _move_if_decoding(attempt)
    if attempt.early_finish is not None:
        life.finish(entry, attempt.early_finish, now_s)


def _move_if_decoding(attempt: Attempt) -> None:
    if attempt.is_verified and attempt.entry.state is RequestState.HANDING_OFF:
        attempt.entry.move_to(RequestState.DECODING)


def _apply_terminal(
    life: Lifecycle,
    node: NodeState,
    attempt: Attempt,
    report: AttemptRefused | AttemptFinished | AttemptFailed | KVReleased,
    now_s: float,
) -> None:
    role = node.description.role
    life.settle(attempt, role, now_s)
    if isinstance(report, AttemptRefused) and not isinstance(_error_of(report), CallerError):
        node.record_refusal(now_s)
    if not attempt.is_current:
        return
    if isinstance(report, AttemptFinished):
        _apply_finished(life, node, attempt, report, now_s)
    elif isinstance(report, KVReleased):
        _apply_hold_ended(life, node, attempt, now_s)
    else:
        _apply_failed(life, node, attempt, report, now_s)


def _apply_finished(
    life: Lifecycle, node: NodeState, attempt: Attempt, report: AttemptFinished, now_s: float
) -> None:
    if survives_loss_of(attempt, node.description.role):
        # A prefill node can end a request only with its first token; this one says nothing about the rest.
        return
    if attempt.has_first_token:
        life.finish(attempt.entry, report.finish_reason, now_s)
    elif node.description.role is Role.DECODE and attempt.prefill.state is SideState.LIVE:
        attempt.early_finish = report.finish_reason
    else:
        fail_by_fault(life, node, attempt, "it finished an attempt without its token", now_s)


def _apply_hold_ended(life: Lifecycle, node: NodeState, attempt: Attempt, now_s: float) -> None:
    """A node let go by itself: right after the handoff for a prefill node, a failure for all else."""
    is_handed_over = attempt.entry.state is not RequestState.PREFILLING
    if node.description.role is Role.PREFILL and is_handed_over and attempt.decode.state is SideState.LIVE:
        return
    error = NodeUnavailable(f"node {node.description.node_id} gave up its KV too early")
    life.fail_attempt(attempt, error, now_s, blamed=[node.description.node_id])


def _apply_failed(
    life: Lifecycle, node: NodeState, attempt: Attempt, report: AttemptRefused | AttemptFailed, now_s: float
) -> None:
    error = _error_of(report)
    if isinstance(error, InvalidRequest | ContextLengthExceeded):
        life.fail(attempt.entry, error, now_s)
    elif isinstance(report, AttemptRefused):
        life.refuse_attempt(attempt, error, now_s)
    elif _is_explained_by_prefill(attempt, error):
        # Its word is on another connection and may come later: the answer's only token, perhaps.
        life.counters.num_cancelled_transfers += 1
    elif not survives_loss_of(attempt, node.description.role):
        life.fail_attempt(attempt, error, now_s, blamed=_blamed(node, attempt, error))


def _is_explained_by_prefill(attempt: Attempt, error: KVRelayError) -> bool:
    """Whether a prefill node that still has the attempt gave up the transfer, and so says why itself."""
    return isinstance(error, TransferCancelled) and attempt.prefill.state is SideState.LIVE


def _error_of(report: AttemptRefused | AttemptFailed) -> KVRelayError:
    return error_from_code(report.code, report.message, field=report.field or None)


def _blamed(node: NodeState, attempt: Attempt, error: KVRelayError) -> Iterable[NodeId]:
    """A transfer has two ends, and either may be the faulty one."""
    if isinstance(error, TransferFailed | KVLayoutMismatch):
        return attempt.prefill.node_id, attempt.decode.node_id
    return (node.description.node_id,)


def survives_loss_of(attempt: Attempt, role: Role) -> bool:
    """Whether an attempt can go on without that node: the prefill one, once the handoff is verified."""
    return role is Role.PREFILL and attempt.entry.state is RequestState.DECODING


def fail_by_fault(life: Lifecycle, node: NodeState, attempt: Attempt, fault: str, now_s: float) -> None:
    """The node broke the contract for this attempt."""
    node_id = node.description.node_id
    life.fail_attempt(attempt, EngineFailed(f"node {node_id}: {fault}"), now_s, blamed=[node_id])


def apply_loss(life: Lifecycle, node: NodeState, reason: str, now_s: float) -> None:
    """The node is gone, with all it held: settle its sides, continue elsewhere what hung on it.

    Newest requests first, so that the oldest continuation ends up at the queue's front.
    """
    role, node_id = node.description.role, node.description.node_id
    life.counters.num_nodes_lost += 1
    attempts = sorted(node.in_flight.values(), key=lambda attempt: attempt.entry.serial, reverse=True)
    life.cluster.remove_node(node, now_s)
    life.policy.note_lost(node)
    life.effects.extend(life.pulls.on_holder_lost(node))
    for attempt in attempts:
        life.settle(attempt, role, now_s)
        if attempt.is_current and not survives_loss_of(attempt, role):
            error = NodeUnavailable(f"the {role} node {node_id} was lost: {reason}")
            life.fail_attempt(attempt, error, now_s)


def apply_faults(
    life: Lifecycle, node: NodeState, faults: Iterable[tuple[AttemptId, str]], now_s: float
) -> None:
    """End the attempts in whose tokens the node broke the contract."""
    for attempt_id, fault in faults:
        attempt = node.in_flight.get(attempt_id)
        if attempt is not None and attempt.is_current:
            fail_by_fault(life, node, attempt, fault, now_s)
