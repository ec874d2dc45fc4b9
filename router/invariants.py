"""What must hold between the core's books after every event. Assertions only; used by tests."""

from __future__ import annotations

from collections import Counter

from kvrelay.core.node_messages import Role
from kvrelay.core.service_terms import Priority
from kvrelay.router.admission_queue import AdmissionQueue
from kvrelay.router.cluster_state import ClusterState, NodeState
from kvrelay.router.ledger import ENDED, Ledger, RequestEntry, RequestState, SideState
from kvrelay.router.output_merge import NO_ATTEMPT


def check_books(ledger: Ledger, cluster: ClusterState, queue: AdmissionQueue) -> None:
    """Assert that ledger, nodes' books and queue agree."""
    _check_requests(ledger, queue)
    _check_streams(ledger)
    _check_queue(ledger, queue)
    _check_attempts(ledger, cluster)
    _check_pulls(ledger, cluster)
    _check_nodes(ledger, cluster)


def _check_requests(ledger: Ledger, queue: AdmissionQueue) -> None:
    for request_id, entry in ledger.requests.items():
        assert entry.request_id == request_id
        assert entry.state not in ENDED, f"{request_id} ended and is still listed as live"
        waiting = queue.waiting.get(entry.model)
        is_queued = waiting is not None and entry in waiting
        assert is_queued == (entry.state is RequestState.QUEUED), (
            f"{request_id}: {entry.state} and queue differ"
        )
        assert (entry.attempt is None) == is_queued, f"{request_id}: an orphan without attempt, or two homes"
        assert entry.deadline_s >= ledger.earliest_deadline_s, f"{request_id}: its deadline is not watched"
        _check_merge(entry)
    for serial, entry in ledger.closing.items():
        assert entry.serial == serial
        assert entry.state in ENDED
        assert entry.attempt is None
        assert entry.num_unsettled_attempts > 0, f"{entry.request_id} is kept for nothing"


def _check_merge(entry: RequestEntry) -> None:
    merge = entry.merge
    assert merge.first_index == entry.request.num_output_tokens
    assert merge.next_index <= max(merge.max_tokens, merge.first_index)
    assert len(merge.early_tokens) == len(merge.early_logprobs) <= merge.max_early_tokens
    if entry.attempt is None:
        assert merge.attempt == merge.flowing == NO_ATTEMPT
    else:
        assert merge is entry.attempt.merge
        assert merge.attempt == entry.attempt.attempt_id
        assert merge.flowing in (NO_ATTEMPT, merge.attempt)
        has_moved_on = entry.state in (RequestState.HANDING_OFF, RequestState.DECODING)
        assert entry.attempt.has_first_token or not has_moved_on
        assert entry.attempt.is_verified or entry.state is not RequestState.DECODING


def _check_streams(ledger: Ledger) -> None:
    listed = [
        (session, stream_id, entry)
        for session, streams in ledger.streams.items()
        for stream_id, entry in streams.items()
    ]
    assert all(ledger.streams.values()), "a session without requests is kept"
    assert len(listed) == len(ledger.requests)
    for session, stream_id, entry in listed:
        assert (entry.session, entry.stream_id) == (session, stream_id)
        assert ledger.requests[entry.request_id] is entry


def _check_queue(ledger: Ledger, queue: AdmissionQueue) -> None:
    entries = list(queue.entries())
    assert queue.num_queued == len(entries)
    assert all(len(waiting) for waiting in queue.waiting.values()), "an empty queue is kept"
    for priority in Priority:
        number = sum(waiting.num_of_class(priority) for waiting in queue.waiting.values())
        assert queue.num_of_class(priority) == number <= queue.max_of_class(priority)
    for entry in entries:
        assert entry.state is RequestState.QUEUED
        assert ledger.requests[entry.request_id] is entry


def _check_attempts(ledger: Ledger, cluster: ClusterState) -> None:
    unsettled: Counter[int] = Counter()
    for attempt_id, attempt in ledger.attempts.items():
        entry = attempt.entry
        unsettled[entry.serial] += 1
        assert attempt.attempt_id == attempt_id
        assert attempt.is_current or not attempt.is_settled, f"attempt {attempt_id} is kept for nothing"
        assert entry.request_id in ledger.requests or entry.serial in ledger.closing, "an orphan attempt"
        for role in Role:
            side = attempt.side(role)
            holders = [node for node in cluster.nodes.values() if attempt_id in node.in_flight]
            is_held = any(node.description.node_id == side.node_id for node in holders)
            assert is_held == (side.state is not SideState.SETTLED), (
                f"attempt {attempt_id}: {role} books differ"
            )
            assert all(
                node.description.node_id in (attempt.prefill.node_id, attempt.decode.node_id)
                for node in holders
            )
            is_releasing = (attempt_id, role) in ledger.releasing
            assert is_releasing == (side.state is SideState.RELEASING)
            assert side.state is SideState.SETTLED or is_releasing or attempt.is_current, "a forgotten hold"
    for entry in (*ledger.requests.values(), *ledger.closing.values()):
        assert entry.num_unsettled_attempts == unsettled[entry.serial]
    assert all(attempt_id in ledger.attempts for attempt_id, _ in ledger.releasing)


def _check_pulls(ledger: Ledger, cluster: ClusterState) -> None:
    for pull_id, pull in ledger.pulls.items():
        attempt, holder = pull.attempt, pull.holder
        assert pull.pull_id == pull_id
        assert attempt.pull is pull
        assert holder.state is not SideState.SETTLED, f"pull {pull_id} is kept for nothing"
        holders = [node for node in cluster.nodes.values() if pull_id in node.sends]
        assert [node.description.node_id for node in holders] == [holder.node_id]
        assert (holder.state is SideState.RELEASING) == (pull_id in ledger.releasing_pulls)
        is_wanted = attempt.is_current and attempt.entry.state is RequestState.PREFILLING
        assert is_wanted or holder.state is SideState.RELEASING, f"pull {pull_id} is a forgotten hold"
    assert ledger.releasing_pulls.keys() <= ledger.pulls.keys()
    for node in cluster.nodes.values():
        assert all(ledger.pulls.get(pull_id) is pull for pull_id, pull in node.sends.items())
    for attempt in ledger.attempts.values():
        own = attempt.pull
        assert own is None or (own.holder.state is SideState.SETTLED) == (own.pull_id not in ledger.pulls)


def _check_nodes(ledger: Ledger, cluster: ClusterState) -> None:
    for node_id, node in cluster.nodes.items():
        description = node.description
        assert description.node_id == node_id
        assert cluster.models[description.model].nodes[description.role][node_id] is node
        sides = [attempt.side(description.role) for attempt in node.in_flight.values()]
        assert all(
            ledger.attempts.get(attempt_id) is node.in_flight[attempt_id] for attempt_id in node.in_flight
        )
        assert all(side.node_id == node_id for side in sides)
        assert node.outstanding_prefill_tokens == sum(side.num_tokens for side in sides)
        assert node.reserved_blocks == sum(side.num_blocks for side in sides) <= description.num_blocks
        _check_steady_run(node)
    _check_holdings(cluster)
    listed = sum(len(of_role) for model in cluster.models.values() for of_role in model.nodes.values())
    assert listed == len(cluster.nodes)


def _check_holdings(cluster: ClusterState) -> None:
    holdings = [node.holdings for node in cluster.nodes.values()]
    slots = [held.slot for held in holdings if held.slot is not None]
    assert sorted([*slots, *cluster.kv.free_slots]) == list(range(cluster.kv.index.max_nodes))
    assert all(len(held.guesses) <= held.max_guesses for held in holdings)
    assert cluster.kv.index.num_entries <= cluster.config.max_index_entries


def _check_steady_run(node: NodeState) -> None:
    run = node.steady_run
    if run is None or not run.is_live:
        return
    assert node.description.role is Role.DECODE
    for merge in run.merges:
        assert merge.steady_run is run, "a run delivers for an output that has left it"
        assert merge.flowing != NO_ATTEMPT
        assert merge.flowing in node.in_flight, "a run delivers what the node has given back"
        assert merge.flowing == merge.attempt
