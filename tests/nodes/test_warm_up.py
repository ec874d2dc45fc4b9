"""A warmed-up engine has computed something, and holds nothing."""

from __future__ import annotations

import pytest

from kvrelay.engine.config import EngineConfig
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import INSTANT
from kvrelay.node.warm_up import warm_up


@pytest.mark.parametrize("num_blocks", [2, 4, 64])
def test_warm_up_computes_and_leaves_nothing_held(num_blocks: int) -> None:
    engine = SimEngine(EngineConfig("sim", "sim", num_blocks=num_blocks, sim_timing=INSTANT))
    warm_up(engine)
    load = engine.load()
    assert not engine.has_work()
    assert load.num_held_blocks == 0
    assert load.num_cached_blocks > 0
