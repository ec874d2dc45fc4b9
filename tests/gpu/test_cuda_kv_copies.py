"""Copies of KV on GPUs: the same bytes as the host's, queued, and from shards on several GPUs.

Skipped where there is no GPU: `make test-gpu` runs them on a machine that has one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvrelay.core.kv import KVLayout
from kvrelay.engine.cuda.copy_kernels import IndexCopier, RowCopier
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.engine.host_kv import HostKVStore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYOUT = KVLayout(4, 300, 16, 8, 128, "bfloat16", 2)
SHAPE = (4, 2, 300, 16, 8, 128)
TOKENS = range(5, 4001)


def random_cache() -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, SHAPE, dtype=torch.int16).view(torch.bfloat16)


def shards_of(cache: torch.Tensor, num_shards: int) -> list[torch.Tensor]:
    """One a GPU, as many as there are, in turn."""
    num_gpus = torch.cuda.device_count()
    parts = cache.chunk(num_shards, dim=4)
    return [part.contiguous().to(f"cuda:{index % num_gpus}") for index, part in enumerate(parts)]


def shuffled(seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(LAYOUT.num_blocks)[:260].tolist())


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("copier", [None, IndexCopier()], ids=["chosen", "index_select"])
def test_shards_on_gpus_make_and_take_the_hosts_messages(num_shards: int, copier: RowCopier | None) -> None:
    cache = random_cache()
    host = HostKVStore(LAYOUT, cache.view(torch.uint8).view(4, 2, -1, 2048).numpy())
    store = CudaKVStore(LAYOUT, shards_of(cache, num_shards), copier=copier)
    empty = shards_of(torch.zeros_like(cache), num_shards)
    receiver = CudaKVStore(LAYOUT, empty, copier=copier)
    if copier is None:
        assert store.copier_name == "triton"
    source, target = shuffled(1), shuffled(2)
    layers, num_bytes = range(1, 4), 3 * len(TOKENS) * LAYOUT.token_bytes_per_layer
    mine, theirs = store.allocate_staging(num_bytes + 64), host.allocate_staging(num_bytes + 64)
    host.gather(source, layers, TOKENS, theirs, 64)
    store.mark_written()
    assert store.gather(source, layers, TOKENS, mine, 64).wait() == num_bytes
    assert bytes(mine.bytes.cpu().numpy()) == bytes(theirs.host_view())
    receiver.mark_freed()
    assert receiver.scatter(target, layers, TOKENS, mine, 64).wait() == num_bytes
    rows = [
        whole.view(torch.int16)[1:, :, list(table)].flatten(2, 3)[:, :, TOKENS.start : TOKENS.stop]
        for whole, table in ((torch.cat([part.cpu() for part in empty], dim=4), target), (cache, source))
    ]
    assert torch.equal(*rows)


def test_a_gather_is_queued_behind_the_engines_work_and_is_late() -> None:
    cache = torch.zeros(SHAPE, dtype=torch.bfloat16, device="cuda:0")
    store = CudaKVStore(LAYOUT, [cache])
    staging = store.allocate_staging(4 * 16 * LAYOUT.token_bytes_per_layer)
    torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
    cache.fill_(1.0)
    store.mark_written()
    copy = store.gather((3,), range(4), range(16), staging, 0)
    assert not copy.is_done()
    copy.wait()
    assert copy.is_done()
    assert bool((staging.bytes.view(torch.bfloat16) == 1.0).all())
