"""The ranks' sums and gathers: NCCL between GPUs, Gloo between CPU processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from kvrelay.core.errors import ConfigError
from kvrelay.engine.model.parallel import Shard

if TYPE_CHECKING:
    from kvrelay.engine.cuda.symmetric_sum import SymmetricSum

CONNECT_TIMEOUT: Final = timedelta(seconds=120)
OPERATION_TIMEOUT: Final = timedelta(hours=1)
"""The first sum waits for the rank that loads last; a rank that is gone is noticed by its process."""

logger = logging.getLogger(__name__)

_all_gather: Callable[[Tensor, Tensor], object] = getattr(
    dist,
    "all_gather_single",
    dist.all_gather_into_tensor,  # its name from torch 2.13 on
)


class TorchCollectives:
    """See `kvrelay.engine.model.parallel.Collectives`; a process has at most one that is open.

    Sums of up to `max_rows` rows of `hidden_size` take a shorter way where the GPUs allow it.

    Raises:
        ConfigError: this process has a process group of torch.distributed already.
    """

    def __init__(
        self,
        shard: Shard,
        device: torch.device,
        store: Store,
        *,
        dtype: torch.dtype,
        hidden_size: int,
        max_rows: int,
    ) -> None:
        if dist.is_initialized():
            raise ConfigError("tensor_parallel_size: a process has one engine with more than one rank")
        self._shard = shard
        is_cuda = device.type == "cuda"
        if not is_cuda:  # the ranks are on this host, whatever its name resolves to
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=store,
            rank=shard.rank,
            world_size=shard.size,
            timeout=OPERATION_TIMEOUT,
            device_id=device if is_cuda else None,
        )
        self._meeting = torch.zeros(1, device=device)
        self._symmetric = _symmetric_sum(device, dtype, hidden_size, max_rows, shard) if is_cuda else None

    @property
    def shard(self) -> Shard:
        return self._shard

    def all_reduce(self, rows: Tensor) -> Tensor:
        if self._symmetric is not None and self._symmetric.takes(rows):
            return self._symmetric(rows)
        dist.all_reduce(rows)
        return rows

    def all_gather(self, rows: Tensor) -> Tensor:
        gathered = rows.new_empty((self._shard.size, *rows.shape))
        _all_gather(gathered.flatten(0, 1), rows)
        return gathered

    def barrier(self) -> None:
        dist.all_reduce(self._meeting)

    def close(self) -> None:
        """Every rank has to; nothing may be under way."""
        self._symmetric = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _symmetric_sum(
    device: torch.device, dtype: torch.dtype, hidden_size: int, max_rows: int, shard: Shard
) -> SymmetricSum | None:
    """None: on some rank it doesn't work; all agree on it."""
    from kvrelay.engine.cuda.symmetric_sum import SymmetricSum

    if not _all_agree(not SymmetricSum.is_used_up, device):
        logger.warning("sums go through NCCL, which takes longer: an earlier engine of a rank's process met")
        return None
    found: SymmetricSum | None = None
    try:
        found = SymmetricSum(device, dtype, hidden_size, max_rows, shard.size)
    except (RuntimeError, ImportError, AttributeError) as error:
        logger.warning("sums go through NCCL, which takes longer: %s", error)
    return found if _all_agree(found is not None, device) else None


def _all_agree(mine: bool, device: torch.device) -> bool:
    agreed = torch.tensor([int(mine)], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed.item())
