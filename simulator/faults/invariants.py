"""What must hold after each event, of the process that it happened to; and when all is over, of all.

It looks into the books themselves, private ones included: what they say of themselves may be wrong.
"""

from __future__ import annotations

from typing import Final

from kvrelay.core.ids import NodeId, TransferId
from kvrelay.node.attempt import ENDING, sequence_key
from kvrelay.node.service import TICK_S
from kvrelay.router.ledger import Side
from kvrelay.simulator.faults.cluster import Cluster
from kvrelay.simulator.faults.node_process import SimNode
from kvrelay.simulator.faults.router_process import SimRouter
from kvrelay.simulator.faults.scenario import LEASE_S
from kvrelay.simulator.faults.world import Violation

LATE_S: Final = 0.8
"""What ticks, clocks and delays may add to a time that is kept."""
MAX_FORGOTTEN_S: Final = 3.0
"""So long may a node go on with an attempt that its router has struck from its books, while both are well."""
MAX_ENDING_S: Final = 4.0
"""In so much time an undisturbed node gives back what it holds of an attempt whose end is decided."""


MAY_END_WITHOUT_FAULTS: Final = ("finished", "satisfied", "CANCELLED", "DEADLINE_EXCEEDED", "OVERLOADED")


class Invariants:
    """Checks one cluster. A `Violation` or an `AssertionError` of the code itself says what does not hold."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._ending_since_s: dict[tuple[str, TransferId], float] = {}
        self._forgotten_since_s: dict[tuple[str, TransferId], float] = {}
        self.num_checks = 0

    def watch(self) -> None:
        """Check after each event from now on."""
        for router in self._cluster.routers:
            router.process.check = lambda router=router: self._check_router(router)  # type: ignore[misc]
        for node in self._cluster.nodes:
            node.process.check = lambda node=node: self._check_node(node)  # type: ignore[misc]

    def _was_disturbed(self, name: str, within_s: float) -> bool:
        return self._world.now_s - self._cluster.disturbed_s.get(name, -1e9) < within_s

    # ---- after each event --------------------------------------------------------------------------

    def _check_router(self, router: SimRouter) -> None:
        if not router.has_changed:
            return
        router.has_changed = False
        self.num_checks += 1
        core = router.core
        core.check_invariants()
        now_s, name = router.process.now_s(), router.process.name
        ledger = core._ledger
        if core._counters.num_faulty_frames:
            raise Violation(f"{name} was sent unusable tokens")
        is_late = not self._was_disturbed(name, 1.0)
        for entry in ledger.requests.values():
            error = entry.last_error
            if error is not None and error.code in ("ENGINE_FAILED", "INTERNAL", "INVALID_REQUEST"):
                raise Violation(f"{name}: {entry.request_id}: a broken contract: {error.message}")
            if is_late and now_s > entry.deadline_s + LATE_S:
                raise Violation(f"{name}: {entry.request_id} outlives its deadline")
            if entry.not_before_s > now_s + core.config.max_retry_pause_s:
                raise Violation(f"{name}: {entry.request_id} waits too long for its next attempt")
        for attachment in router.shell.attachments.by_node.values():
            silent_s = now_s - attachment.last_heard_s
            has_stood_still = self._world.now_s - router.process.last_resumed_s < 2.0
            if silent_s > core.config.node_silence_s + LATE_S and not has_stood_still:
                raise Violation(
                    f"{name}: {attachment.node_id} is silent for {silent_s:.2f} s and still attached"
                )
        for (attempt_id, role), released_s in ledger.releasing.items():
            if now_s - released_s <= core.config.ack_timeout_s + LATE_S:
                break
            self._check_overdue(router, ledger.attempts[attempt_id].side(role), attempt_id)

    def _check_overdue(self, router: SimRouter, side: Side, attempt_id: int) -> None:
        within_s = router.core.config.lease_s + 3.0
        if self._was_disturbed(router.process.name, within_s) or self._was_disturbed(side.node_id, within_s):
            return
        raise Violation(f"{router.process.name}: {side.node_id} does not answer ReleaseKV({attempt_id})")

    def _check_node(self, node: SimNode) -> None:
        """Of those of its parts that have done something."""
        worker, thread = node.worker, node.transfers.thread
        if not (worker.has_changed or node.has_changed or thread.has_changed):
            return
        self.num_checks += 1
        if worker.has_changed:
            worker.engine.check()
        if worker.has_changed or node.has_changed:
            self._check_attempts(node)
        if thread.has_changed:
            self._check_bounds(node)
        worker.has_changed = node.has_changed = thread.has_changed = False

    def _check_attempts(self, node: SimNode) -> None:
        engine, states = node.worker.engine, node.core.states()
        keys = {sequence_key(transfer_id) for transfer_id in states}
        for sequence in engine.live_sequences():
            if sequence.key not in keys:
                raise Violation(f"{node.name}: its engine has {sequence.key}, and nobody will release it")
        if len(states) > node.config.max_attempts_in_flight:
            raise Violation(f"{node.name}: {len(states)} attempts are in flight")
        self._check_leases(node)

    def _check_leases(self, node: SimNode) -> None:
        """A node lets go of what it holds for a router that it has not heard for the lease."""
        world_s, name = self._world.now_s, node.name
        is_disturbed = self._was_disturbed(name, 1.0)
        for transfer_id, state in node.core.states().items():
            key = (name, transfer_id)
            if state in ENDING:
                since_s = self._ending_since_s.setdefault(key, world_s)
                if world_s - since_s > MAX_ENDING_S and not self._was_disturbed(name, MAX_ENDING_S + 4.0):
                    raise Violation(f"{name}: {transfer_id} is {state} since {since_s:.2f} s")
                continue
            self._check_remembered(node, transfer_id)
            heard_s = node.heard_s.get(transfer_id.router_epoch, -1e9)
            if world_s - heard_s > LEASE_S * 1.25 + 2 * TICK_S + LATE_S and not is_disturbed:
                raise Violation(
                    f"{name}: {transfer_id} is {state}, its router was last heard at {heard_s:.2f} s,"
                    f" the lease is {LEASE_S:g} s"
                )

    def _check_remembered(self, node: SimNode, transfer_id: TransferId) -> None:
        """No node works for long on what its router has given up."""
        router = self._router_of_epoch(transfer_id.router_epoch)
        if router is None:
            return
        ledger = router.core._ledger
        if transfer_id.attempt in ledger.attempts or transfer_id.attempt in ledger.pulls:
            return
        since_s = self._forgotten_since_s.setdefault((node.name, transfer_id), self._world.now_s)
        names = (node.name, router.process.name)
        if self._world.now_s - since_s < MAX_FORGOTTEN_S or any(
            self._was_disturbed(name, MAX_FORGOTTEN_S + 2.0) for name in names
        ):
            return
        raise Violation(f"{node.name}: {transfer_id} is not in its router's books since {since_s:.2f} s")

    def _router_of_epoch(self, router_epoch: int) -> SimRouter | None:
        for router in self._cluster.routers:
            if router.process.is_alive and router.core.router_epoch == router_epoch:
                return router
        return None

    def _check_bounds(self, node: SimNode) -> None:
        owner, config = node.transfers.owner, node.config.transfer
        for pool, size in (
            (owner._sender._pool, config.num_send_slots),
            (owner._receiver._pool, config.num_receive_slots),
        ):
            if len(pool._free) + len(pool._holders) != size:
                raise Violation(f"{node.name}: staging slots are lost: {pool.counts}")
        num_offers = owner._receiver.num_pending_offers
        if num_offers > config.max_pending_offers:
            raise Violation(f"{node.name}: {num_offers} offers are pending")
        if max(node.transfers.num_open) > config.max_concurrent_transfers:
            raise Violation(f"{node.name}: {node.transfers.num_open} transfers are open")

    # ---- when all is over --------------------------------------------------------------------------

    def check_end(self) -> None:
        """Every request has ended, those after the faults well; nothing is held anywhere."""
        unended = [request.name for request in self._cluster.requests if not request.end]
        if unended:
            raise Violation(f"requests without an end: {' '.join(unended)}")
        scenario = self._cluster.scenario
        if scenario.num_faults == 0:
            for request in self._cluster.requests:
                is_refused = (
                    "OVERLOADED" in request.failures
                )  # and has used up its retries, whatever came last
                if request.end not in MAY_END_WITHOUT_FAULTS and not is_refused:
                    raise Violation(f"{request.name} ended by {request.end}, though nothing broke")
        for probe in self._cluster.probes:
            if probe.end != "finished":
                raise Violation(f"{probe.name}, asked when all was mended, ended by {probe.end}")
        for node in self._cluster.nodes:
            self._check_node_at_rest(node)
        for router in self._cluster.routers:
            self._check_router_at_rest(router)
        for client in self._cluster.clients:
            if client.num_sessions > len(self._cluster.routers):
                raise Violation(f"{client.process.name} has {client.num_sessions} sessions")

    def _check_node_at_rest(self, node: SimNode) -> None:
        load, snapshot = node.worker.engine.load(), node.transfers.owner.snapshot()
        held = {
            "attempts": node.core.num_attempts,
            "blocks": load.num_held_blocks,
            "sequences": load.num_running + load.num_waiting + load.num_reserved,
            "transfers": snapshot.num_pushes + snapshot.num_receives + snapshot.num_pending_offers,
            "open transfers": sum(node.transfers.num_open),
            "send slots": snapshot.send_slots.held + snapshot.send_slots.quarantined,
            "receive slots": snapshot.receive_slots.held + snapshot.receive_slots.quarantined,
            "leases beyond its routers": max(0, len(node.core._leases) - len(self._cluster.routers)),
        }
        held |= sizes_at_rest(node)
        if any(held.values()):
            raise Violation(f"{node.name} at rest still holds { {k: n for k, n in held.items() if n} }")

    def _check_router_at_rest(self, router: SimRouter) -> None:
        name, status = router.process.name, router.core.status(router.process.now_s())
        if any(status.num_requests_by_state.values()) or status.num_unsettled_attempts:
            raise Violation(f"{name} at rest still has {status.num_requests_by_state}")
        if len(status.nodes) != len(self._cluster.nodes):
            raise Violation(f"{name} has {len(status.nodes)} of {len(self._cluster.nodes)} nodes")
        for node in status.nodes:
            if node.num_in_flight or node.outstanding_prefill_tokens or node.reserved_blocks:
                raise Violation(f"{name} at rest still counts something at {node.description.node_id}")
            if node.is_index_stale:
                raise Violation(f"{name} does not know what {node.description.node_id} holds")
        ledger, sessions = router.core._ledger, router.shell.sessions
        sizes = {
            "streams": len(ledger.streams),
            "releases": len(ledger.releasing),
            "closing requests": len(ledger.closing),
            "queues": len(router.core._queue.waiting),
            "named requests": len(sessions.session_of),
            "sessions beyond its clients": max(0, len(sessions.by_id) - len(self._cluster.clients)),
        }
        if any(sizes.values()):
            raise Violation(f"{name} at rest still keeps {sizes}")
        self._check_index(router)

    def _check_index(self, router: SimRouter) -> None:
        """It has what the nodes hold, and nothing else, unless its bound made it forget."""
        cluster, num_held = router.core._cluster, 0
        index = cluster.block_index
        if index.num_evicted:
            return
        for node in self._cluster.nodes:
            slot = cluster.nodes[NodeId(node.name)].slot
            for part in node.kv_feed.snapshot():
                num_held += part.changes.num_keys
                device, host = part.changes.stored, part.changes.host_stored
                if not all(index.match_prefix([key]).device[slot] for key in device) or not all(
                    index.match_prefix([key]).either[slot] for key in host
                ):
                    raise Violation(f"{router.process.name}: its index lacks what {node.name} holds")
        if index.num_entries != num_held:
            raise Violation(f"{router.process.name}: {index.num_entries} blocks indexed, {num_held} held")


def sizes_at_rest(node: SimNode) -> dict[str, int]:
    """Of what a node keeps for attempts and links: all 0 when nothing has happened for long."""
    owner = node.transfers.owner
    sender, receiver = owner._sender, owner._receiver
    return {
        "links to receivers": len(sender._links),
        "used links": len(sender._link_of) + len(receiver._link_of),
        "waiting messages": len(sender._waiting),
        "writes": len(sender._writing),
        "holders that wait for a slot": len(sender._pool._demand) + len(receiver._pool._demand),
        "draining transfers": len(receiver._draining._entries),
        "silenced transfers": len(node.transfers._silenced),
        "names of sequences": len(node.worker._turns._transfer_ids),
        "connections beyond its routers": max(0, len(node.core._connected) - len(node.heard_s)),
    }
