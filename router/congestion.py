"""What a second of work costs everybody else: how many requests it will delay.

With N nodes behind one queue, work that keeps one of them busy for another second delays each request that
comes before that queue is next empty by 1/N second. Now Q requests wait; the queue drains by the spare
capacity, N (1 - u) where u is the share of it that arriving work takes, so Q / (1 - u) requests pass through
until it is empty. A second of work therefore costs the others ``Q / N / (1 - u)`` seconds of waiting: nothing
while nodes are idle, and ever more as the cluster saturates. That is how much more a policy must value the
work that a cached prefix saves than it values one request's own time.

Source: the delay that a unit of work brings to a busy period of a single-server queue (Kleinrock, Queueing
Systems I, section 5.8), for N servers that share one queue.
"""

from __future__ import annotations

import math
from typing import Final

_WINDOW_S: Final = 60.0
"""How far back load is looked at."""


class Congestion:
    """Measures the share of the capacity that arriving work takes, over about the last minute."""

    def __init__(self) -> None:
        self._seen_s = 0.0
        self._capacity_s = 0.0
        self._work_s = 0.0
        self._squares = 0.0

    def note_work(self, work_s: float, num_nodes: int, now_s: float) -> None:
        """Work of so many node-seconds was placed; `num_nodes` have been there since the last call."""
        elapsed_s = max(0.0, now_s - self._seen_s)
        self._seen_s = now_s
        kept = math.exp(-elapsed_s / _WINDOW_S)
        self._capacity_s = self._capacity_s * kept + elapsed_s * num_nodes
        self._work_s = self._work_s * kept + work_s
        self._squares = self._squares * kept + work_s * work_s

    def weight(self, num_waiting: int, num_nodes: int) -> float:
        """Seconds of others' waiting that a second of work costs while `num_waiting` requests wait.

        Spare capacity is known only as well as so few requests tell: it is not taken to be less than the
        standard error of that estimate.
        """
        if not num_waiting or not num_nodes or self._work_s <= 0.0:
            return 0.0
        capacity_s = max(self._capacity_s, self._work_s)
        error = min(1.0, math.sqrt(self._squares) / capacity_s)
        spare = max(1.0 - self._work_s / capacity_s, error)
        return num_waiting / num_nodes / spare
