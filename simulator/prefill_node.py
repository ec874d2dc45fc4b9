"""A modelled prefill node: one prompt after another, in order of arrival, with its own prefix cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.core.ids import AttemptId
from kvrelay.simulator.block_cache import BlockCache
from kvrelay.simulator.cost_model import CostModel


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One prompt on a node. `pull_from` is the node whose cache is to be looked into for its first
    `num_pull_blocks` blocks. The figures below are known once it has started."""

    attempt: AttemptId
    request: int
    num_tokens: int
    blocks: Sequence[int]
    queued_s: float
    pull_from: SimPrefillNode | None = None
    num_pull_blocks: int = 0
    started_s: float = 0.0
    num_cached_tokens: int = 0
    num_pulled_tokens: int = 0
    pull_s: float = 0.0
    compute_s: float = 0.0


class SimPrefillNode:
    """See the module. `busy_s` is what it has worked in all."""

    def __init__(self, number: int, num_cache_blocks: int, block_tokens: int, costs: CostModel) -> None:
        self.number = number
        self.cache = BlockCache(num_cache_blocks)
        self.busy_s = 0.0
        self._block_tokens = block_tokens
        self._costs = costs
        self._jobs: deque[PrefillJob] = deque()

    def add(self, job: PrefillJob, now_s: float) -> float | None:
        """Take a job; returns when it will be done if it starts at once."""
        self._jobs.append(job)
        return self._start(now_s) if len(self._jobs) == 1 else None

    def finish(self, now_s: float) -> tuple[PrefillJob, list[int], list[int], float | None]:
        """The foremost job is done. Returns it, the blocks that its cache has got and lost, and when the next
        one will be done, if there is one."""
        job = self._jobs.popleft()
        stored, removed = self.cache.insert(job.blocks)
        return job, stored, removed, self._start(now_s) if self._jobs else None

    def _start(self, now_s: float) -> float:
        """Look into the caches, as they are now, and begin."""
        job = self._jobs[0]
        own = self.cache.num_held(job.blocks)
        reach = own
        if job.pull_from is not None and job.num_pull_blocks > own:
            reach = min(job.pull_from.cache.num_held(job.blocks, own), max(own, job.num_pull_blocks))
        most = job.num_tokens - 1
        own_tokens = min(own * self._block_tokens, most)
        job.num_cached_tokens = min(reach * self._block_tokens, most)
        job.num_pulled_tokens = job.num_cached_tokens - own_tokens
        job.pull_s = self._costs.link.pull_s(job.num_pulled_tokens)
        job.compute_s = self._costs.prefill.one(job.num_tokens, job.num_cached_tokens)
        job.started_s = now_s
        self.busy_s += job.pull_s + job.compute_s
        return now_s + job.pull_s + job.compute_s
