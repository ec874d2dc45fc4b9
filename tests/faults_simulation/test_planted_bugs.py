"""A bug of each kind is found within 500 seeds. So the simulation can fail."""

from __future__ import annotations

import pytest

from kvrelay.simulator.faults.simulate import run_seed
from tests.faults_simulation.planted_bugs import PLANTS, Plant

NUM_SEEDS = 500


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    seed = next((seed for seed in range(NUM_SEEDS) if _is_found(plant, seed)), None)
    assert seed is not None, f"{plant.__name__} was not found in {NUM_SEEDS} seeds"
    assert not run_seed(seed).violation, "it fails by itself"


def _is_found(plant: Plant, seed: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        return bool(run_seed(seed).violation)
