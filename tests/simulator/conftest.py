"""Small traces, and runs over them."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvrelay.simulator.cost_model import CostModel, load_cost_model
from kvrelay.simulator.run import simulate
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.summary import Summary
from kvrelay.simulator.trace import Trace
from kvrelay.simulator.trace_file import read_trace

WriteTrace = Callable[[list[Any]], Path]


@pytest.fixture
def write_trace(tmp_path: Path) -> WriteTrace:
    """Rows as JSON lines (a string goes in as it is)."""

    def write(rows: list[Any]) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


def row(timestamp: float, num_blocks: int, first_id: int, output: int = 20) -> dict[str, Any]:
    ids = list(range(first_id, first_id + num_blocks))
    return {
        "timestamp": timestamp,
        "input_length": num_blocks * 512 - 12,
        "output_length": output,
        "hash_ids": ids,
    }


@pytest.fixture
def sessions(write_trace: WriteTrace) -> Trace:
    """300 requests: 60 conversations of 5 turns, each turn longer than the one before; all share a block."""
    rng, rows = Random(3), []
    for session in range(60):
        ids = [0]
        at = rng.random() * 1000
        for _ in range(5):
            ids = [*ids, *(1 + session * 1000 + len(ids) + step for step in range(rng.randrange(1, 6)))]
            rows.append(
                {
                    "timestamp": at,
                    "input_length": len(ids) * 512 - rng.randrange(500),
                    "output_length": rng.randrange(1, 60),
                    "hash_ids": ids,
                }
            )
            at += 200 + rng.random() * 100
    return read_trace(write_trace(rows), 512)


@pytest.fixture
def independent() -> CostModel:
    return load_cost_model("independent")


RunPolicy = Callable[..., Summary]


@pytest.fixture
def run_policy(sessions: Trace, independent: CostModel) -> RunPolicy:
    """Over `sessions`: 4 prefill nodes, no decode, unless said otherwise."""

    def run(policy: str, trace: Trace = sessions, **changes: Any) -> Summary:
        settings = {
            "num_prefill_nodes": 4,
            "num_decode_nodes": 0,
            "cache_blocks": 400,
            "policy": policy,
            "load": 0.8,
            "seed": 1,
        }
        summary, _ = simulate(trace, Scenario(**(settings | changes)), independent)
        return summary

    return run
