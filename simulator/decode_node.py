"""A modelled decode node: continuous batching, computed from one change of its batch to the next.

While the batch stays the same, its steps take a time that grows evenly with the context, so any number of
them is one formula; nothing is done per token. Sequences join and leave between two steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from kvrelay.core.ids import AttemptId
from kvrelay.simulator.cost_model import DecodeModel
from kvrelay.simulator.gap_times import GapTimes, Segment

_MAX_SEGMENTS: Final = 4096
"""Kept before those are dropped that no running sequence has seen."""


@dataclass(slots=True, eq=False)
class DecodeJob:
    """One sequence whose first token is out and whose KV is here. `first_token_s` is when that token came."""

    attempt: AttemptId
    request: int
    num_context_tokens: int
    num_tokens: int
    """Those that are still to be drawn, at least 1."""
    num_room_tokens: int
    """KV of its whole life."""
    first_token_s: float
    joined_step: int = 0
    joined_s: float = 0.0


class SimDecodeNode:
    """See the module. `due_s` is when it next has something to do; `advance` is to be called then."""

    def __init__(self, number: int, model: DecodeModel, gaps: GapTimes) -> None:
        self.number = number
        self.due_s = math.inf
        self.num_tokens_out = 0
        self._model = model
        self._batch_step_s = model.batch_step_s()
        self._gaps = gaps
        self._now_s = 0.0
        self._step = 0
        self._due_steps = 0
        self._context = 0
        self._free_tokens = model.kv_tokens
        self._running: list[tuple[int, int, DecodeJob]] = []
        self._joining: deque[DecodeJob] = deque()
        self._num_jobs = 0
        self._fresh: list[DecodeJob] = []
        self._segments: list[Segment] = []
        self._segment_ends: list[int] = []

    def add(self, job: DecodeJob, now_s: float) -> None:
        """A sequence has come; it joins at the end of the step that runs now, when there is room."""
        self._joining.append(job)
        if not self._running:
            self._now_s = now_s
            self._join()
            return
        steps = self._steps_until(now_s)
        if steps < self._due_steps:
            self._set_due(steps)

    def advance(self) -> list[DecodeJob]:
        """Move to `due_s`. Returns the sequences that have ended there."""
        steps, batch = self._due_steps, len(self._running)
        seconds = self.due_s - self._now_s
        if steps:
            self._count_gaps(seconds / steps, steps * batch)
            self._segments.append(Segment(steps, seconds / steps))
            self._step += steps
            self._segment_ends.append(self._step)
        self._context += batch * steps
        self.num_tokens_out += batch * steps
        self._now_s = self.due_s
        ended = []
        while self._running and self._running[0][0] <= self._step:
            ended.append(self._leave(heappop(self._running)[2]))
        self._join()
        return ended

    def gaps_of(self, job: DecodeJob) -> list[Segment]:
        """The gaps between the tokens of a sequence that has just ended, the first one included."""
        first = bisect_right(self._segment_ends, job.joined_step)
        segments = self._segments[first:]
        if not segments:
            return []
        wait_s = job.joined_s - job.first_token_s
        head = Segment(1, wait_s + segments[0].gap_s)
        return [head, Segment(segments[0].num_gaps - 1, segments[0].gap_s), *segments[1:]]

    def _join(self) -> None:
        while self._joining and len(self._running) < self._model.max_num_seqs:
            job = self._joining[0]
            if job.num_room_tokens > self._free_tokens and self._running:
                break
            self._joining.popleft()
            job.joined_step, job.joined_s = self._step, self._now_s
            self._free_tokens -= job.num_room_tokens
            self._context += job.num_context_tokens
            self._num_jobs += 1
            self._fresh.append(job)
            heappush(self._running, (self._step + job.num_tokens, self._num_jobs, job))
        self._forget_segments()
        if self._running:
            self._set_due(self._running[0][0] - self._step)
        else:
            self.due_s, self._due_steps = math.inf, 0

    def _count_gaps(self, gap_s: float, num_gaps: int) -> None:
        """The first gap of a sequence holds its wait from the first token on."""
        for job in self._fresh:
            self._gaps.add(job.joined_s - job.first_token_s + gap_s, 1)
        self._gaps.add(gap_s, num_gaps - len(self._fresh))
        self._fresh.clear()

    def _leave(self, job: DecodeJob) -> DecodeJob:
        self._free_tokens += job.num_room_tokens
        self._context -= job.num_context_tokens + job.num_tokens
        return job

    def _forget_segments(self) -> None:
        if len(self._segments) < _MAX_SEGMENTS:
            return
        oldest = min((job.joined_step for _, _, job in self._running), default=self._step)
        keep = bisect_right(self._segment_ends, oldest)
        if keep >= _MAX_SEGMENTS // 2:
            del self._segments[:keep], self._segment_ends[:keep]

    def _set_due(self, steps: int) -> None:
        self._due_steps = steps
        self.due_s = self._now_s + self._seconds(steps)

    def _seconds(self, steps: int) -> float:
        """Of the next so many steps of this batch, each of which adds a token of context a sequence."""
        batch, token_s = len(self._running), self._model.context_token_s
        first_s = self._batch_step_s[batch] + token_s * self._context
        return steps * first_s + token_s * batch * (steps * (steps - 1) / 2)

    def _steps_until(self, time_s: float) -> int:
        """The least number of whole steps, one at least, that end at `time_s` or later."""
        batch, token_s = len(self._running), self._model.context_token_s
        first_s = self._batch_step_s[batch] + token_s * self._context
        half = token_s * batch / 2
        elapsed_s = time_s - self._now_s
        linear = first_s - half
        if half > 0:
            steps = (math.sqrt(linear * linear + 4 * half * elapsed_s) - linear) / (2 * half)
        else:
            steps = elapsed_s / first_s
        return max(1, math.ceil(steps - 1e-9))
