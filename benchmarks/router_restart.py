"""How soon a router that starts again knows what it must: each node, each block they hold, each lease.

    python -m benchmarks.router_restart [--json] [--nodes 16] [--repeats 3]

Two routers, half of the nodes of each role (`sim`, real processes), their caches full of prompts. One router
is killed while both have answers under way, stays away for a moment or for longer than any node's back-off,
and starts again. The other one is the witness: what it hears from the nodes is what the new one has to know.
Times are in seconds from the start of its process (`from_start`) and from when it listened (`from_ready`):

- `attached`: it sees all nodes;
- `index`: no node's part of its block index is stale, and it has as many entries as the witness;
- `leases`: every node's attempts, those that it holds for the dead router included, are the witness' number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from benchmarks.local_cluster import running_service
from kvrelay.client import AsyncClient
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.errors import KVRelayError
from kvrelay.core.sampling import SamplingParams

OUTAGES_S = (0.0, 8.0)
NODE_ARGS = ("--model=sim", "--num-blocks=65536", "--sim-prefill-token-s=0", "--sim-decode-base-s=0.05")
NUM_PROMPTS_PER_NODE, PROMPT_TOKENS = 8, 8000
NUM_STREAMS_PER_NODE = 2
PATIENCE_S = 60.0
POLL_S = 0.02
LOCAL = ("--host", "127.0.0.1", "--http-port", "0")


@dataclass(frozen=True)
class Routers:
    """gRPC addresses."""

    killed: str
    witness: str


@dataclass
class Restart:
    """One restart's times, in seconds from the start of the process, and what there was to know."""

    outage_s: float
    ready_s: float
    num_nodes: int
    reached_s: dict[str, float] = field(default_factory=dict)
    num_entries: int = 0
    num_attempts: int = 0

    def as_dict(self) -> dict[str, object]:
        return {
            "outage_s": self.outage_s,
            "ready_s": self.ready_s,
            "from_start_s": self.reached_s,
            "from_ready_s": {what: seconds - self.ready_s for what, seconds in self.reached_s.items()},
            "num_nodes": self.num_nodes,
            "num_entries": self.num_entries,
            "num_attempts": self.num_attempts,
        }


def attempts_of(state: ClusterState) -> dict[str, int]:
    return {node.node_id: node.load.num_attempts for node in state.nodes if node.load is not None}


def is_indexed(state: ClusterState, witness: ClusterState) -> bool:
    is_stale = any(node.index_stale for node in state.nodes)
    return not is_stale and 0 < witness.index.num_entries <= state.index.num_entries


GOALS: dict[str, Callable[[ClusterState, ClusterState], bool]] = {
    "attached": lambda state, witness: len(state.nodes) == len(witness.nodes),
    "index": is_indexed,
    "leases": lambda state, witness: attempts_of(state) == attempts_of(witness),
}


async def fill(router: str, num_nodes: int) -> None:
    """Prompts, each its own, until every node holds some."""
    async with AsyncClient([router]) as client:
        sampling = SamplingParams(max_tokens=1)
        prompts = [[1 + index] * PROMPT_TOKENS for index in range(NUM_PROMPTS_PER_NODE * num_nodes)]
        for start in range(0, len(prompts), num_nodes):
            batch = prompts[start : start + num_nodes]
            await asyncio.gather(*[client.complete(prompt, sampling=sampling) for prompt in batch])


async def stream_for_long(client: AsyncClient, index: int) -> None:
    """Answers without end: leases that live."""
    while True:
        try:
            await client.complete([3, 4, index], sampling=SamplingParams(max_tokens=2000, ignore_eos=True))
        except KVRelayError:  # its router was killed
            await asyncio.sleep(0.5)


@contextmanager
def streaming(stack: asyncio.TaskGroup, routers: Sequence[str], num_streams: int) -> Iterator[None]:
    """Answers under way through these routers."""
    clients = [AsyncClient([router]) for router in routers]
    tasks = [
        stack.create_task(stream_for_long(clients[index % len(clients)], index))
        for index in range(num_streams)
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def until_attempts(router: str, least: int) -> None:
    async with AsyncClient([router]) as client:
        async for state in client.watch_cluster(interval_s=0.1):
            if sum(attempts_of(state).values()) >= least:
                return


async def watch(routers: Routers, outage_s: float, started_s: float, ready_s: float) -> Restart:
    async with AsyncClient([routers.killed]) as client, AsyncClient([routers.witness]) as knower:
        witness = await knower.cluster_state()
        restart = Restart(outage_s, ready_s, len(witness.nodes))
        while len(restart.reached_s) < len(GOALS):
            witness, state = await knower.cluster_state(), await client.cluster_state()
            now_s = time.perf_counter() - started_s
            for what, is_reached in GOALS.items():
                if what not in restart.reached_s and is_reached(state, witness):
                    restart.reached_s[what] = now_s
            restart.num_entries = state.index.num_entries
            restart.num_attempts = sum(attempts_of(state).values())
            if now_s > PATIENCE_S:
                raise SystemExit(f"not within {PATIENCE_S:g} s; reached: {restart.reached_s}; {state}")
            await asyncio.sleep(POLL_S)
        return restart


async def measure(
    routers: Routers, killed: ExitStack, pid: int, num_nodes: int, repeats: int
) -> list[Restart]:
    """Kill and start again, `repeats` times for each outage. `killed` holds the router that is killed."""
    restarts = []
    num_streams = NUM_STREAMS_PER_NODE * num_nodes
    port = routers.killed.rpartition(":")[2]
    for outage_s in [outage_s for outage_s in OUTAGES_S for _ in range(repeats)]:
        async with asyncio.TaskGroup() as group:
            with streaming(group, (routers.killed, routers.witness), num_streams):
                # Each answer has an attempt on its decode node, and for a moment one on a prefill node.
                await until_attempts(routers.witness, num_streams)
                os.kill(pid, signal.SIGKILL)
                await asyncio.to_thread(killed.close)
                await asyncio.sleep(outage_s)
                started_s = time.perf_counter()
                service = await asyncio.to_thread(
                    killed.enter_context, running_service("router", [*LOCAL, "--port", port])
                )
                pid, ready_s = service.pid, time.perf_counter() - started_s
                restarts.append(await watch(routers, outage_s, started_s, ready_s))
    return restarts


def run(num_nodes: int, repeats: int) -> list[Restart]:
    with ExitStack() as stack:
        killed = stack.enter_context(ExitStack())
        first = killed.enter_context(running_service("router", [*LOCAL, "--port", "0"]))
        second = stack.enter_context(running_service("router", [*LOCAL, "--port", "0"]))
        routers = Routers(first.ready["grpc_address"], second.ready["grpc_address"])
        for index in range(num_nodes):
            role = ("prefill", "decode")[index % 2]
            to = ("--router", routers.killed, "--router", routers.witness)
            stack.enter_context(running_service(role, [*to, "--node-id", f"{role}-{index // 2}", *NODE_ARGS]))
        asyncio.run(fill(routers.witness, num_nodes))
        return asyncio.run(measure(routers, killed, first.pid, num_nodes, repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    restarts = run(args.nodes, args.repeats)
    if args.json:
        print(json.dumps([restart.as_dict() for restart in restarts]))
        return
    print(f"A router killed and started again; {args.nodes} nodes; seconds from its start (from ready)")
    goals = "".join(f"{what:>18}" for what in GOALS)
    print(f"{'outage':>8}{'ready':>8}{goals}{'entries':>10}{'attempts':>10}")
    for restart in restarts:
        reached = "".join(
            f"{f'{restart.reached_s[what]:.2f} ({restart.reached_s[what] - restart.ready_s:.2f})':>18}"
            for what in GOALS
        )
        print(
            f"{restart.outage_s:>8.1f}{restart.ready_s:>8.2f}{reached}"
            f"{restart.num_entries:>10}{restart.num_attempts:>10}"
        )


if __name__ == "__main__":
    main()
