"""The host tier's bookkeeping: whoever reads a block under a prefix hash reads that prefix's content."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.errors import ConfigError, Overloaded
from kvrelay.core.ids import BlockId
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.host_tier import BlockCopy, HostTier, num_host_blocks
from tests.engine.random_traffic import run_random_traffic

NUM_BLOCKS = 8


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


def names(*numbers: int) -> list[BlockHash]:
    return [name(number) for number in numbers]


class TieredPoolMachine(RuleBasedStateMachine):
    """A pool with contents. Chains share their beginnings; copies are executed late, but in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(4)
        self.pool = BlockPool(NUM_BLOCKS, host_tier=self.tier)
        self.device: dict[int, BlockHash | None] = {}
        self.host: dict[int, BlockHash | None] = {}
        self.tables: list[list[BlockId]] = []

    @precondition(lambda self: not self.tables and not self.device)
    @rule(num_slots=st.integers(1, 12))
    def choose_size(self, num_slots):
        self.tier = HostTier(num_slots)
        self.pool = BlockPool(NUM_BLOCKS, host_tier=self.tier)

    @rule(chain=st.integers(0, 5), length=st.integers(1, 5), num_more=st.integers(0, 2), runs=st.booleans())
    def take(self, chain, length, num_more, runs):
        """A sequence comes; where it `runs`, the copies are executed, it reads its prefix, and writes."""
        hashes = names(*(10 * (chain // 3) + i if i < 2 else 100 * (chain + 1) + i for i in range(length)))
        matched = self.pool.match_prefix(hashes)
        num_free = self.pool.num_free
        on_device = [block for block in matched if block is not None]
        num_new = length + num_more - len(on_device)
        if num_new + self.pool.num_unheld(on_device) > num_free:
            return
        table = self.pool.take(matched, hashes[: len(matched)], length + num_more)
        assert len(set(table)) == length + num_more
        assert self.pool.match_prefix(hashes[: len(matched)]) == table[: len(matched)]
        self.tables.append(table)
        if not runs:
            return
        self.execute()
        assert [self.device[block] for block in table[: len(matched)]] == hashes[: len(matched)]
        for block in table[len(matched) :]:
            self.device[block] = None
        for block, block_hash in zip(table[len(matched) : length], hashes[len(matched) :], strict=True):
            self.device[block] = block_hash
            self.pool.register(block, block_hash)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @rule()
    def execute(self):
        for block, slot, to_host in self.tier.take_copies():
            if to_host:
                self.host[slot] = self.device[block]
            else:
                self.device[block] = self.host[slot]

    @invariant()
    def every_known_block_has_its_content_once_the_copies_are_executed(self):
        self.pool.check()
        device, host = dict(self.device), dict(self.host)
        for block, slot, to_host in self.tier._copies:
            if to_host:
                host[slot] = device[block]
            else:
                device[block] = host[slot]
        for block_hash, block in self.pool._block_of_hash.items():
            assert device[block] == block_hash
        for block_hash, slot in self.tier._slot_of.items():
            assert host[slot] == block_hash


TieredPoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestTieredPoolMachine = TieredPoolMachine.TestCase


def filled(pool: BlockPool, *numbers: int) -> list[BlockId]:
    """Blocks that hold these hashes, released: the later ones leave first."""
    blocks = pool.allocate(len(numbers))
    for block, number in zip(blocks, numbers, strict=True):
        assert pool.register(block, name(number))
    pool.release(blocks)
    return blocks


def test_a_swap_of_all_blocks_copies_out_before_it_copies_in():
    tier = HostTier(4)
    pool = BlockPool(2, host_tier=tier)
    filled(pool, 1, 2)
    filled(pool, 3, 4)
    assert [copy.to_host for copy in tier.take_copies()] == [True, True]
    matched = pool.match_prefix(names(1, 2))
    assert matched == [None, None]
    first, second = pool.take(matched, names(1, 2), 2)
    copies = tier.take_copies()
    assert {copy.block for copy in copies[:2]} == {first, second} == {copy.block for copy in copies[2:]}
    assert [copy.to_host for copy in copies] == [True, True, False, False]
    assert len({copy.slot for copy in copies}) == 4, "what is restored keeps its slot meanwhile"


def test_what_was_restored_is_not_copied_out_again():
    tier = HostTier(2)
    pool = BlockPool(2, host_tier=tier)
    filled(pool, 1, 2)
    pool.release(pool.allocate(2))
    tier.take_copies()
    pool.release(pool.take([None, None], names(1, 2), 2))
    assert [copy.to_host for copy in tier.take_copies()] == [False, False]
    pool.release(pool.allocate(2))
    assert tier.take_copies() == []
    assert pool.match_prefix(names(1, 2)) == [None, None]


def test_a_copy_of_what_the_device_has_leaves_first_and_its_end_before_its_beginning():
    tier = HostTier(3)
    for number, block in ((9, 5), (2, 1), (1, 0)):
        tier.save(BlockId(block), name(number))
    tier.hold(names(1, 2))
    tier.restore(name(1), BlockId(0))
    tier.restore(name(2), BlockId(1))
    tier.save(BlockId(6), name(10))
    assert [name(number) in tier for number in (1, 2, 9, 10)] == [True, False, True, True]
    tier.save(BlockId(7), name(11))
    assert [name(number) in tier for number in (1, 9, 10, 11)] == [False, True, True, True]


def test_nothing_takes_the_slots_that_wait_to_be_restored():
    tier = HostTier(1)
    tier.save(BlockId(0), name(1))
    tier.hold(names(1))
    tier.save(BlockId(1), name(2))
    assert name(2) not in tier
    tier.restore(name(1), BlockId(1))
    assert tier.take_copies() == [BlockCopy(BlockId(0), 0, True), BlockCopy(BlockId(1), 0, False)]
    tier.check()


def test_a_prefix_may_be_partly_here_and_partly_there():
    tier = HostTier(4)
    pool = BlockPool(4, host_tier=tier)
    blocks = filled(pool, 1, 2, 3)
    pool.acquire([blocks[2]])
    pool.allocate(2)
    assert pool.match_prefix(names(1, 2, 3, 4)) == [blocks[0], None, blocks[2]]


def test_a_tier_that_holds_no_block_is_refused():
    assert num_host_blocks(0, 256) == 0
    assert num_host_blocks(1023, 256) == 3
    with pytest.raises(ConfigError, match="host_kv_bytes 255"):
        num_host_blocks(255, 256)


def random_requests(random, request_of, prompt_of):
    return [
        request_of(
            prompt_of(random.randint(1, 60), random.randint(0, 5)),
            max_tokens=random.randint(1, 30),
            temperature=random.choice([0.0, 1.0]),
            seed=random.randint(0, 5),
        )
        for _ in range(80)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_reads_the_right_kv_whatever_was_moved(
    build_sim, build_reading, drive, request_of, prompt_of, seed
):
    random = Random(seed)
    requests = random_requests(random, request_of, prompt_of)
    expected = [drive(build_sim()).generate(request)[0] for request in requests]
    host_kv_bytes = 256 * random.randint(1, 60)
    driver = drive(build_reading(num_blocks=random.randint(24, 60), host_kv_bytes=host_kv_bytes))
    run_random_traffic(driver, requests, expected, random)
    load = driver.engine.load()
    assert load.num_used_host_blocks <= load.num_host_blocks == host_kv_bytes // 256
    assert load.host_hit_tokens > 0 or load.num_host_blocks < 10


@pytest.mark.parametrize("seed", range(6))
def test_random_handoffs_send_and_reserve_what_the_host_had(
    build_reading, drive, request_of, prompt_of, move_kv, seed
):
    """The receiver compares all KV with what the tokens say, what it had itself included."""
    random = Random(seed)
    small = {"num_blocks": 40, "host_kv_bytes": 256 * random.randint(5, 80)}
    source, target = drive(build_reading(**small)), drive(build_reading(**small))
    for index, request in enumerate(random_requests(random, request_of, prompt_of)):
        key = f"k{index}"
        source.ready.clear()
        source.engine.submit_prefill(request, key)
        source.run()
        try:
            move_kv(source.engine, target.engine, key, request, source.ready)
            target.engine.start_decode(key, source.tokens(key)[0])
        except Overloaded:
            pass
        source.engine.release(key)
        for _ in range(random.randint(0, 20)):
            target.step()
    target.run()
    assert not source.failures
    assert not target.failures
    for engine in (source.engine, target.engine):
        assert engine.load().num_held_blocks == 0
        assert engine.load().host_hit_tokens > 0
