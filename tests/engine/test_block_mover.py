"""Blocks moved through staging buffers, in whatever order the queues run, end where plain copies put them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

import pytest
import torch

from kvrelay.core.ids import BlockId
from kvrelay.engine.block_mover import CpuBlockMover
from kvrelay.engine.cuda.block_mover import CopyQueues, CudaBlockMover, _loads
from kvrelay.engine.host_tier import BlockCopy

NUM_BLOCKS, NUM_SLOTS = 12, 24


@dataclass(eq=False)
class Queued:
    operation: Callable[[], None]
    after: list[Queued]
    is_done: bool = False


class LazyQueue:
    """Runs nothing until `run_next`: a device that is far behind."""

    def __init__(self) -> None:
        self.waiting: deque[Queued] = deque()

    def enqueue(self, operation: Callable[[], None], after: Iterable[Queued | None]) -> Queued:
        queued = Queued(operation, [mark for mark in after if mark is not None])
        self.waiting.append(queued)
        return queued

    def can_run(self) -> bool:
        return bool(self.waiting) and all(mark.is_done for mark in self.waiting[0].after)

    def run_next(self) -> None:
        queued = self.waiting.popleft()
        queued.operation()
        queued.is_done = True


def random_cache(dtype: torch.dtype, head_dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 2, NUM_BLOCKS, 4, 2, head_dim, generator=generator).to(dtype)


def random_copies(random: Random, filled: set[int]) -> list[BlockCopy]:
    """Slots come back only after they were filled; blocks and slots repeat at will."""
    copies = []
    share_out = random.choice([0.2, 0.6, 1.0])
    for _ in range(random.randint(1, 16)):
        to_host = not filled or random.random() < share_out
        slot = random.randrange(NUM_SLOTS) if to_host else random.choice(sorted(filled))
        filled.add(slot)
        copies.append(BlockCopy(BlockId(random.randrange(NUM_BLOCKS)), slot, to_host))
    return copies


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("blocks_per_load", [1, 2, 5])
def test_any_order_that_the_queues_allow_gives_what_plain_copies_give(
    seed: int, blocks_per_load: int
) -> None:
    random = Random(seed)
    cache = random_cache(torch.float32, 2)
    expected = cache.clone()
    queues = CopyQueues(LazyQueue(), LazyQueue(), LazyQueue())
    block_bytes = cache[:, :, 0].numel() * 4
    mover = CudaBlockMover(cache, NUM_SLOTS, queues=queues, load_bytes=blocks_per_load * block_bytes)
    plain = CpuBlockMover(expected, NUM_SLOTS)
    filled: set[int] = set()
    for number in range(30):
        copies = random_copies(random, filled)
        mover.move(copies)
        plain.move(copies)
        block = random.randrange(NUM_BLOCKS)  # the next step overwrites a block
        queues.engine.enqueue(lambda block=block, number=number: cache[:, :, block].fill_(number), [])
        expected[:, :, block].fill_(number)
        run_some(queues, random, num=random.randint(0, 30))
    run_some(queues, random)
    assert not any(queue.waiting for queue in queues)
    assert torch.equal(cache, expected)
    last = random.sample(sorted(filled), min(len(filled), NUM_BLOCKS))
    mover.move([BlockCopy(BlockId(block), slot, False) for block, slot in enumerate(last)])
    plain.move([BlockCopy(BlockId(block), slot, False) for block, slot in enumerate(last)])
    run_some(queues, random)
    assert torch.equal(cache, expected)


def run_some(queues: CopyQueues, random: Random, num: int | None = None) -> None:
    """So many operations, or all, of queues that need not wait; one queue is slow, another is fast."""
    order = random.sample(list(queues), 3)
    while num is None or num > 0:
        ready = [queue for queue in order if queue.can_run()]
        if not ready:
            return
        ready[0 if random.random() < 0.95 else -1].run_next()
        num = None if num is None else num - 1


def test_a_load_brings_nothing_twice_into_a_block() -> None:
    """A scatter of two rows into one leaves either of them."""
    copies = [BlockCopy(BlockId(block), slot, False) for block, slot in ((0, 0), (1, 1), (0, 2), (2, 3))]
    assert list(_loads(copies, 3)) == [copies[:2], copies[2:]]


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 8), (torch.uint8, 3), (torch.float32, 5)])
def test_rows_of_any_number_of_bytes_come_back_as_they_were(dtype: torch.dtype, head_dim: int) -> None:
    with torch.inference_mode():
        cache = random_cache(dtype, head_dim)
    before = cache.clone()
    mover = CudaBlockMover(cache, NUM_SLOTS)
    mover.move([BlockCopy(BlockId(block), slot, True) for block, slot in ((3, 0), (1, 1), (7, 5))])
    mover.move([BlockCopy(BlockId(block), slot, False) for block, slot in ((2, 5), (9, 0), (3, 1))])
    for to, origin in ((2, 7), (9, 3), (3, 1)):
        assert torch.equal(cache[:, :, to], before[:, :, origin])
    untouched = [block for block in range(NUM_BLOCKS) if block not in (2, 9, 3)]
    assert torch.equal(cache[:, :, untouched], before[:, :, untouched])


@pytest.mark.parametrize(("block", "slot"), [(NUM_BLOCKS, 0), (-1, 0), (0, NUM_SLOTS), (0, -1)])
def test_what_is_outside_is_a_bug_and_reaches_no_kernel(block: int, slot: int) -> None:
    mover = CudaBlockMover(random_cache(torch.float32, 2), NUM_SLOTS)
    with pytest.raises(AssertionError, match="no such"):
        mover.move([BlockCopy(BlockId(block), slot, True)])
