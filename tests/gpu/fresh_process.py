"""A process of its own for what can be done once a process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def call_in_fresh_process(function: Callable[..., None], *arguments: Any) -> None:
    """Return when it has; raises what it raises."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        processes.submit(function, *arguments).result()
