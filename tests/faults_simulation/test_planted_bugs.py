"""A bug of each kind is found within 500 seeds. So the simulation can fail."""

from __future__ import annotations

import pytest

from kvrelay.simulator.faults.simulate import run_seed
from tests.faults_simulation.planted_bugs import PLANTS, Plant

NUM_SEEDS = 500


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    for seed in range(NUM_SEEDS):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            if run_seed(seed).violation:
                assert not _fails_by_itself(seed)
                return
    pytest.fail(f"{plant.__name__} was not found in {NUM_SEEDS} seeds")


def _fails_by_itself(seed: int) -> bool:
    return bool(run_seed(seed).violation)
