"""What rank 0 and its followers say to each other, over one pipe each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from kvrelay.engine.forward_pass import StepInputs
from kvrelay.engine.host_tier import BlockCopy

if TYPE_CHECKING:
    from kvrelay.engine.cuda.decode_graphs import GraphInputs

Command: TypeAlias = "StepInputs | GraphInputs | tuple[BlockCopy, ...]"
"""A step for every rank to compute, or blocks to move between device and host. A follower leaves at the
pipe's end."""


@dataclass(frozen=True, slots=True)
class Started:
    """The follower's process runs and has its device."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Its weights are there. `cache` is its KV cache, where that isn't in memory of rank 0's already."""

    cache: Tensor | None


@dataclass(frozen=True, slots=True)
class FollowerFailed:
    """It ends."""

    message: str


Reply: TypeAlias = Started | Loaded | FollowerFailed
