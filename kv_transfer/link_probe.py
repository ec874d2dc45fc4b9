"""What a new link carries, and what to say when that is far less than the hardware gives.

The commonest fault of such clusters is silent: UCX leaves NVLink for TCP or for copies through host memory,
everything works, a hundred times slower. So the first thing that a link carries is a few large writes into
the receiver's scratch bytes, against the clock.
"""

from __future__ import annotations

from typing import Final

from kvrelay.core.kv import DeviceKind

NVLINK_FLOOR_GB_PER_S: Final = 50.0
PROBE_BYTES: Final = {DeviceKind.CPU: 1 << 20, DeviceKind.CUDA: 16 << 20}
"""One write: long enough that what a write costs beside its bytes does not decide."""
MAX_PROBE_WRITES: Final = 16
MAX_PROBE_S: Final = 0.05


class LinkProbe:
    """Times up to `MAX_PROBE_WRITES` writes of `num_bytes`, one after the other, for `MAX_PROBE_S` at most.

    The best counts: the first ones also open handles, touch pages and wake a link that was asleep.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._started_s: list[float] = []
        self._best_s = float("inf")

    def write_started(self, now_s: float) -> None:
        self._started_s.append(now_s)

    def write_ended(self, now_s: float) -> bool:
        """Whether there shall be another."""
        self._best_s = min(self._best_s, now_s - self._started_s[-1])
        return len(self._started_s) < MAX_PROBE_WRITES and now_s - self._started_s[0] < MAX_PROBE_S

    @property
    def bytes_per_s(self) -> float:
        """After at least one write."""
        return self.num_bytes / max(self._best_s, 1e-9)


def floor_gb_per_s(configured: float, *, is_on_gpus: bool, is_one_host: bool) -> float:
    """What a link must give: `configured`, or, where that is negative, what the hardware makes certain."""
    if configured >= 0:
        return configured
    return NVLINK_FLOOR_GB_PER_S if is_on_gpus and is_one_host else 0.0


def slow_link_text(
    names: tuple[str, str], bytes_per_s: float, floor: float, *, is_on_gpus: bool
) -> str | None:
    """What to tell people of a link, from sender to receiver, below `floor` GB/s; None of others."""
    measured = bytes_per_s / 1e9
    if measured >= floor:
        return None
    lost = "cuda_ipc (NVLink)" if is_on_gpus else "shared memory or RDMA"
    return (
        f"the KV link from {names[0]} to {names[1]} gives {measured:.2f} GB/s, at least {floor:g} were"
        f" expected: UCX has probably fallen back from {lost} to TCP or to copies through host memory"
        " (UCX_PROTO_INFO=y shows the lane that it took)"
    )
