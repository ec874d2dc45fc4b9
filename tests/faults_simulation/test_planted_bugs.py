"""A bug of each kind is found within 500 seeds. So the simulation can fail."""

from __future__ import annotations

import pytest

from kvrelay.simulator.faults.simulate import run_seed
from tests.faults_simulation.first_seeds import NUM_SEEDS, first_seed
from tests.faults_simulation.planted_bugs import PLANTS, Plant


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    seed = first_seed(plant)
    assert seed is not None, f"{plant.__name__} was not found in {NUM_SEEDS} seeds"
    assert not run_seed(seed).violation, "it fails by itself"
