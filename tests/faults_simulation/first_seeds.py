"""``python -m tests.faults_simulation.first_seeds``: which seed finds each planted bug first, as a table.

For docs/fault-simulation.md.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from kvrelay.simulator.faults.simulate import run_seed
from tests.faults_simulation.planted_bugs import PLANTS, Plant

NUM_SEEDS = 500


def first_seed(plant: Plant) -> int | None:
    """The first seed, from 0, that finds the bug; None: none below `NUM_SEEDS` does."""
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(NUM_SEEDS):
            patch.undo()
            plant(patch)
            if run_seed(seed).violation:
                return seed
    return None


def main() -> None:
    """Print the table: what is planted, in the words of its docstring, and its first seed."""
    num_processes = len(os.sched_getaffinity(0))
    print("| planted | first seed |\n| --- | --: |")
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for plant, seed in zip(PLANTS, pool.map(first_seed, PLANTS), strict=True):
            words = (plant.__doc__ or "").strip().rstrip(".")
            print(f"| {words[0].lower()}{words[1:]} | {'none' if seed is None else seed} |", flush=True)


if __name__ == "__main__":
    main()
