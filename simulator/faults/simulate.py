"""Play one seed: build the cluster that it draws, break it, check it, and say what came of it."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvrelay.simulator.faults.cluster import Cluster
from kvrelay.simulator.faults.faults import FaultInjector
from kvrelay.simulator.faults.invariants import Invariants
from kvrelay.simulator.faults.scenario import LATEST_END_S, PROBES_START_S, draw_scenario
from kvrelay.simulator.faults.world import World

SETTLE_S = 7.5
"""After the last request: leases, quarantine and idle links run out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a seed gave. `violation` empty: everything held. Two runs of one code and seed are equal.

    `ends` counts requests by how they ended, `faults` what was done to the cluster, `counters` what was done
    about it.
    """

    seed: int
    violation: str
    digest: int
    num_steps: int
    num_checks: int
    virtual_s: float
    num_tokens: int
    ends: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    transcript: tuple[str, ...] = ()


def run_seed(seed: int, *, keeps_transcript: bool = False) -> Outcome:
    """Play it; never raises for what the code under test does wrong."""
    with _silence():
        return asyncio.run(_play(seed, keeps_transcript=keeps_transcript))


async def _play(seed: int, *, keeps_transcript: bool) -> Outcome:
    """The routers' shells make futures, which belong to a running loop; nothing here ever waits for it."""
    world = World(seed, keeps_transcript=keeps_transcript)
    cluster = Cluster(world, draw_scenario(world.rng))
    invariants, injector = Invariants(cluster), FaultInjector(cluster)
    invariants.watch()
    violation = ""
    try:
        cluster.start()
        injector.plan()
        _run(world, cluster)
        invariants.check_end()
    except Exception as error:  # whatever it is, the code under test did it
        violation = f"{type(error).__name__}: {error}" + _place_of(error)
        world.say("VIOLATED", violation)
    return Outcome(
        seed=seed,
        violation=violation,
        digest=world.digest,
        num_steps=world.num_steps,
        num_checks=invariants.num_checks,
        virtual_s=world.now_s,
        num_tokens=sum(len(request.progress.token_ids) for request in cluster.requests),
        ends=dict(Counter(request.end for request in cluster.requests)),
        faults=injector.counts,
        counters=_count(cluster),
        transcript=tuple(world.transcript or ()),
    )


def _run(world: World, cluster: Cluster) -> None:
    """Until every request has ended and what it left has settled."""
    world.run(PROBES_START_S + cluster.scenario.num_probes)
    while world.now_s < LATEST_END_S - SETTLE_S and not all(request.end for request in cluster.requests):
        world.run(world.now_s + 0.5)
    world.run(world.now_s + SETTLE_S)


def _count(cluster: Cluster) -> dict[str, int]:
    """Of the routers' present lives, the clients and the KV wire."""
    counts: Counter[str] = Counter()
    for router in cluster.routers:
        if router.process.life:
            counters = router.core.status(router.process.now_s()).counters
            counts["attempts"] += counters.num_attempts
            counts["router continuations"] += counters.num_continuations
            counts["refused attempts"] += counters.num_attempts_refused
            counts["overdue releases"] += counters.num_overdue_releases
            counts["kv gaps"] += counters.num_kv_gaps
            counts["pulls"] += counters.num_pulls
            counts["failed pulls"] += counters.num_pulls_failed
    for node in cluster.nodes:
        if node.process.life:
            counts["preemptions"] += node.worker.engine.load().num_preemptions
            counts["host tier hits"] += node.worker.engine.load().host_hit_tokens > 0
    for request in cluster.requests:
        counts["client continuations"] += request.progress.num_continuations
        counts["client retries"] += request.progress.num_retries
    counts["corrupted writes"] += cluster.fabric.faults.num_corrupted
    counts["late writes"] += cluster.fabric.faults.num_late
    return dict(counts)


def _place_of(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    code = traceback.tb_frame.f_code
    return f" ({code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} {code.co_name})"


@contextmanager
def _silence() -> Iterator[None]:
    """No logs: in a simulation everything that is worth a warning happens all the time. No garbage collection
    in the midst of it, either."""
    was_disabled, collects = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.CRITICAL)
    gc.disable()
    try:
        yield
    finally:
        logging.disable(was_disabled)
        if collects:
            gc.enable()
