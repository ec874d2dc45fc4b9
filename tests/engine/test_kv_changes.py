"""What an engine says of its prefix cache is what can be found there, however late it is asked; and its keys
are those that anyone computes from the tokens."""

from __future__ import annotations

from hashlib import sha256
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvrelay.core.block_hash import BlockHash, block_key
from kvrelay.core.ids import BlockId
from kvrelay.core.kv_events import KVChanges
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.change_log import ChangeLog
from kvrelay.engine.host_tier import HostTier
from kvrelay.router.block_keys import PromptBlocks
from tests.engine.random_traffic import run_random_traffic

BLOCK_SIZE = 4


def name(*numbers: int) -> BlockHash:
    return BlockHash(sha256(repr(numbers).encode()).digest())


class Mirror:
    """Follows what an engine or a pool says."""

    def __init__(self) -> None:
        self.device: set[int] = set()
        self.host: set[int] = set()

    def follow(self, changes: KVChanges | None) -> None:
        if changes is None:
            return
        if changes.cleared:
            self.device, self.host = set(), set()
        self.device = (self.device | set(changes.stored)) - set(changes.removed)
        self.host = (self.host | set(changes.host_stored)) - set(changes.host_removed)

    def check(self, pool: BlockPool) -> None:
        assert self.device == set(map(block_key, pool._block_of_hash))
        tier = pool.host_tier
        assert self.host == (set() if tier is None else {block_key(known) for known in tier.hashes()})


class ChangesMachine(RuleBasedStateMachine):
    """A pool with a host tier, asked for its changes now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, host_tier=HostTier(5))
        self.mirror = Mirror()
        self.tables: list[list[BlockId]] = []

    @rule(chain=st.integers(0, 5), length=st.integers(1, 5))
    def take(self, chain: int, length: int) -> None:
        hashes = [name(chain // 3, i) if i < 2 else name(chain, i) for i in range(length)]
        matched = self.pool.match_prefix(hashes)
        on_device = [block for block in matched if block is not None]
        if length - len(on_device) + self.pool.num_unheld(on_device) > self.pool.num_free:
            return
        table = self.pool.take(matched, hashes[: len(matched)], length)
        for block, block_hash in zip(table, hashes, strict=True):
            self.pool.register(block, block_hash)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @rule()
    def follow(self) -> None:
        self.mirror.follow(self.pool.take_changes())
        self.mirror.check(self.pool)
        assert self.pool.take_changes() is None


ChangesMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestChangesFollowThePool = ChangesMachine.TestCase


def test_more_changes_than_are_noted_give_the_whole_at_the_next_asking() -> None:
    pool = BlockPool(64)
    pool._change_log = ChangeLog(max_changes=10)
    mirror = Mirror()
    mirror.follow(pool.take_changes())
    for block in pool.allocate(11):
        pool.register(block, name(block))
    assert pool._change_log.is_lost
    changes = pool.take_changes()
    assert changes is not None
    assert changes.cleared
    mirror.follow(changes)
    mirror.check(pool)
    [block] = pool.allocate(1)
    pool.register(block, name(99))
    assert pool.take_changes() == KVChanges([block_key(name(99))], [], [], [])


def test_nothing_is_remembered_until_somebody_asks() -> None:
    pool = BlockPool(4)
    for block in pool.allocate(4):
        pool.register(block, name(block))
    assert pool._change_log.is_lost
    stored = [block_key(name(number)) for number in range(4)]
    assert pool.take_changes() == KVChanges(stored, [], [], [], cleared=True)


@pytest.mark.parametrize("host_kv_bytes", [0, 1 << 12])
@pytest.mark.parametrize("seed", range(4))
def test_changes_of_an_engine_under_random_traffic_add_up_to_its_cache(
    build_sim, drive, request_of, prompt_of, seed, host_kv_bytes
):
    random, mirror = Random(seed), Mirror()
    requests = [
        request_of(prompt_of(random.randint(1, 60), random.randint(0, 3)), max_tokens=random.randint(1, 30))
        for _ in range(40)
    ]
    expected = [drive(build_sim()).generate(request)[0] for request in requests]
    driver = drive(build_sim(num_blocks=40, host_kv_bytes=host_kv_bytes))
    step = driver.engine.step

    def step_and_follow():
        output = step()
        if random.random() < 0.5:
            mirror.follow(driver.engine.take_kv_changes())
            mirror.check(driver.engine._scheduler.pool)
        return output

    driver.engine.step = step_and_follow
    run_random_traffic(driver, requests, expected, random)
    assert mirror.device
    assert bool(mirror.host) == bool(host_kv_bytes)


@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_a_decode_nodes_generated_blocks_are_told_under_the_keys_of_the_next_turn(
    build_engine, drive, request_of, prompt_of, move_kv, salt
):
    source, target = drive(build_engine()), drive(build_engine(block_size=BLOCK_SIZE))
    request, mirror = request_of(prompt_of(10), max_tokens=15, salt=salt), Mirror()
    mirror.follow(target.engine.take_kv_changes())
    source.engine.submit_prefill(request, "k")
    source.run()
    move_kv(source.engine, target.engine, "k", request, source.ready)
    target.engine.start_decode("k", source.tokens("k")[0])
    target.run()
    mirror.follow(target.engine.take_kv_changes())

    answer = source.tokens("k") + target.tokens("k")
    conversation = [*request.token_ids, *answer]
    info = target.engine.info
    keys = PromptBlocks(conversation, salt).keys(info.block_size, info.fingerprint.digest)
    assert len(conversation) == 25
    assert mirror.device == set(keys.tolist()), "24 of 25 tokens have KV: the last one was never computed"
