"""From a configuration to a loaded engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.interface import Engine

OPENMP_SPIN_COUNT: Final = "1000"
"""A few microseconds. On an idle machine it was no slower than libgomp's 300,000 turns, and many times
faster beside another busy process on the same cores."""

OnProgress = Callable[[float, str], None]
"""Called with the fraction done, from 0 to 1, and what is being done."""


def load_engine(config: EngineConfig, on_progress: OnProgress | None = None) -> Engine:
    """Build the engine that `config` names; takes as long as reading the weights does.

    Raises:
        ConfigError: the model can't be found, or the engine can't run it; the message says why.
    """
    if config.engine is EngineKind.SIM:
        from kvrelay.engine.sim.engine import SimEngine

        return SimEngine(config)
    # Has to come before torch is imported: its OpenMP reads it when it is loaded. By default a thread that
    # has done its part of an operation spins for a millisecond and more; when two engines share the cores,
    # each then spends its time slices on keeping the other from running, and a step takes ten times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
    try:
        from kvrelay.engine.torch_engine import TorchEngine
    except ImportError as error:
        raise ConfigError(f"the torch engine needs kvrelay[node]: {error}") from error
    return TorchEngine(config, on_progress)
