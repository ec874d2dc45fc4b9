"""The fault simulation finds nothing in many seeds, and plays a seed the same way each time.

To play one that fails again, with its whole story: ``make simulate-faults SEEDS=1 FIRST_SEED=<seed>``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from kvrelay.simulator.faults.run import TRANSCRIPT_LINES, tell_failure
from kvrelay.simulator.faults.scenario import FAULT_KINDS
from kvrelay.simulator.faults.simulate import Outcome, run_seed

NUM_SEEDS = 200
CHUNK = 10
PLAY = "from kvrelay.simulator.faults.simulate import run_seed; print([run_seed(seed).digest for seed in {}])"


@pytest.mark.parametrize("first_seed", range(0, NUM_SEEDS, CHUNK))
def test_whatever_breaks_nothing_is_lost(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + CHUNK):
        if run_seed(seed).violation:
            pytest.fail(tell_failure(seed, TRANSCRIPT_LINES), pytrace=False)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [run_seed(seed) for seed in range(100)]


def test_the_simulation_meets_what_it_is_there_for(outcomes: list[Outcome]) -> None:
    faults, counters, ends = Counter[str](), Counter[str](), Counter[str]()
    for outcome in outcomes:
        faults.update(outcome.faults)
        counters.update(outcome.counters)
        ends.update(outcome.ends)
    assert {*FAULT_KINDS, "rolling restart"} == set(faults)
    for name in ("router continuations", "client continuations", "client retries", "refused attempts"):
        assert counters[name] > 20, counters
    assert counters["pulls"] > 100, counters
    for name in ("corrupted writes", "late writes", "kv gaps", "overdue releases", "failed pulls"):
        assert counters[name] > 0, counters
    assert ends["finished"] > 300, ends
    assert ends["satisfied"] > 20, ends


def test_a_seed_plays_the_same_way_in_every_process() -> None:
    """Whatever order strings hash in."""
    seeds = list(range(6))
    here = [run_seed(seed).digest for seed in seeds]
    assert len(set(here)) == len(here)
    for hash_seed in ("1", "2"):
        played = subprocess.run(
            [sys.executable, "-c", PLAY.format(seeds)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert played.stdout.strip() == str(here)


def test_keeping_a_transcript_changes_nothing() -> None:
    told = run_seed(2, keeps_transcript=True)
    assert told.digest == run_seed(2).digest
    assert any("StartPrefill" in line for line in told.transcript)
