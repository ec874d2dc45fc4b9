"""What the router's core costs by itself, in CPU time: per token of a decode step, and per request.

``python benchmarks/router_core.py [--json] [--streams 256] [--steps 400] [--sessions 1]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import (
    AttemptFinished,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    PrefillFinished,
    Role,
    TokenBatch,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.core import RouterCore
from kvrelay.router.events import NodeAttached, NodeReported, RequestSubmitted, SessionId
from kvrelay.router.least_loaded import LeastLoaded

FINGERPRINT = KVFingerprint("bench", "bfloat16", 32, 8, 128, "rope")
PREFILL, DECODE = NodeId("p0"), NodeId("d0")


@dataclass(frozen=True, slots=True)
class Measured:
    """Times are of the core alone; `bytes_per_token` is what one delivered token leaves in memory. Steady:
    while a decode node's rows stay the same from step to step."""

    num_streams: int
    num_sessions: int
    num_steps: int
    token_us_p50: float
    token_us_best: float
    steady_token_us_p50: float
    request_us: float
    placement_us_at_200_nodes: float
    bytes_per_token: float


def describe(node_id: str, role: Role) -> NodeDescription:
    return NodeDescription(
        node_id=NodeId(node_id), incarnation=1, role=role, model="bench", engine="sim",
        fingerprint=FINGERPRINT,
        vocab_size=128_000, max_model_len=131_072, num_blocks=1_000_000, block_size=16, max_num_seqs=100_000,
        transfer_address=f"{node_id}:1" if role is Role.DECODE else "",
    )  # fmt: skip


def new_core(num_pairs: int = 1) -> RouterCore:
    config = RouterCoreConfig(max_prefill_requests_per_node=100_000, max_prefill_tokens_per_node=2**31)
    core = RouterCore(config, 1, LeastLoaded(), Random(1))
    for index in range(num_pairs):
        core.handle(NodeAttached(describe(f"p{index}", Role.PREFILL)), 0.0)
        core.handle(NodeAttached(describe(f"d{index}", Role.DECODE)), 0.0)
        for node_id in (f"p{index}", f"d{index}"):
            holds_nothing = KVEvent(1, 0, KVChanges(cleared=True))
            core.handle(NodeReported(NodeId(node_id), kv=holds_nothing), 0.0)
    return core


def submit(core: RouterCore, number: int, session: int, prompt: tuple[int, ...]) -> None:
    request = TokenRequest(prompt, len(prompt), SamplingParams(max_tokens=2**30))
    core.handle(RequestSubmitted(RequestId(f"r{number}"), SessionId(session), number, "bench", request), 0.0)


def start_decoding(core: RouterCore, attempt: AttemptId) -> None:
    first = TokenBatch([attempt], [0], [1], [100_000])
    core.handle(NodeReported(PREFILL, first, (PrefillFinished(attempt, 0, 0.0, 0.0),)), 0.0)
    core.handle(NodeReported(DECODE, None, (HandoffVerified(attempt, 1, 1, 0.0, "memory"),)), 0.0)
    core.handle(NodeReported(PREFILL, None, (KVReleased(attempt),)), 0.0)


def measure_tokens(
    num_streams: int, num_sessions: int, num_steps: int, *, steady: bool
) -> tuple[list[float], float]:
    """Microseconds per token of each step, and bytes kept per token. With `steady` each frame is told to be
    the next step of the one before, as a decode node does while its rows stay the same."""
    core = new_core()
    for number in range(1, num_streams + 1):
        submit(core, number, number % num_sessions, (1, 2, 3))
        start_decoding(core, AttemptId(number))
    attempts = sorted(range(1, num_streams + 1), key=lambda number: number % num_sessions)
    counts = [1] * num_streams
    frames: list[TokenBatch] = []
    for step in range(1, 2 * num_steps + 1):
        token_ids = [100_000 + step] * num_streams
        if steady and frames:
            frames.append(frames[-1].next_step(token_ids))
        else:
            frames.append(TokenBatch(attempts, [step] * num_streams, counts, token_ids))
    token_us = []
    for frame in frames[:num_steps]:
        start_ns = time.perf_counter_ns()
        core.handle(NodeReported(DECODE, frame), 0.0)
        token_us.append((time.perf_counter_ns() - start_ns) / 1e3 / num_streams)
    tracemalloc.start()
    for frame in frames[num_steps:]:
        core.handle(NodeReported(DECODE, frame), 0.0)
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return token_us, num_bytes / (num_streams * num_steps)


def measure_requests(num_requests: int) -> float:
    """Microseconds of one request of 2,000 prompt tokens, from submission to settled, 20 tokens of output."""
    core, prompt = new_core(), tuple(range(2000))
    start_ns = time.perf_counter_ns()
    for number in range(1, num_requests + 1):
        submit(core, number, 1, prompt)
        attempt = AttemptId(number)
        start_decoding(core, attempt)
        for index in range(1, 20):
            core.handle(NodeReported(DECODE, TokenBatch([attempt], [index], [1], [7])), 0.0)
        finished = (AttemptFinished(attempt, FinishReason.STOP),)
        core.handle(NodeReported(DECODE, None, finished), 0.0)
    elapsed_us = (time.perf_counter_ns() - start_ns) / 1e3
    assert core.status(0.0).num_unsettled_attempts == 0
    return elapsed_us / num_requests


def measure_placement(num_requests: int) -> float:
    """Microseconds to accept and place one request of 2,000 tokens among 100 prefill and 100 decode nodes."""
    core, prompt = new_core(num_pairs=100), tuple(range(2000))
    start_ns = time.perf_counter_ns()
    for number in range(1, num_requests + 1):
        submit(core, number, 1, prompt)
    return (time.perf_counter_ns() - start_ns) / 1e3 / num_requests


def measure(num_streams: int, num_sessions: int, num_steps: int) -> Measured:
    token_us, bytes_per_token = measure_tokens(num_streams, num_sessions, num_steps, steady=False)
    steady_token_us, _ = measure_tokens(num_streams, num_sessions, num_steps, steady=True)
    token_us.sort()
    return Measured(
        num_streams=num_streams,
        num_sessions=num_sessions,
        num_steps=num_steps,
        token_us_p50=round(token_us[len(token_us) // 2], 3),
        token_us_best=round(token_us[0], 3),
        steady_token_us_p50=round(statistics.median(steady_token_us), 3),
        request_us=round(measure_requests(500), 1),
        placement_us_at_200_nodes=round(measure_placement(200), 1),
        bytes_per_token=round(bytes_per_token, 1),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args(arguments)
    measured = measure(options.streams, options.sessions, options.steps)
    if options.json:
        print(json.dumps(asdict(measured)))
        return
    for name, value in asdict(measured).items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
