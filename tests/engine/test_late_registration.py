"""Blocks that join the prefix cache while a step is under way: nobody sees that they were put off."""

from __future__ import annotations

import pytest

from kvrelay.core.block_hash import root_hash
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.sequence import LiveSequence, Purpose, Stage
from kvrelay.engine.sequence_blocks import SequenceBlocks

BLOCK_SIZE = 4
PROMPT = tuple(range(100, 142))
NUM_FULL = len(PROMPT) // BLOCK_SIZE


@pytest.fixture
def blocks() -> SequenceBlocks:
    return SequenceBlocks(BlockPool(64), BLOCK_SIZE)


def arrived(blocks: SequenceBlocks, arrival: int = 1) -> LiveSequence:
    """A sequence whose whole prompt has come from elsewhere."""
    sequence = new_sequence(arrival)
    assert blocks.take(sequence, 0)
    sequence.num_computed_tokens = len(PROMPT)
    blocks.register_later(sequence)
    return sequence


def new_sequence(arrival: int) -> LiveSequence:
    request = TokenRequest(PROMPT, len(PROMPT), SamplingParams(max_tokens=9))
    return LiveSequence(
        f"s{arrival}",
        request,
        Purpose.GENERATE,
        root_hash(),
        arrival,
        Stage.RUNNING,
        list(PROMPT),
        len(PROMPT),
    )


def num_findable(blocks: SequenceBlocks) -> int:
    probe = new_sequence(99)
    hashes = [probe.block_hash(index, BLOCK_SIZE) for index in range(NUM_FULL)]
    return len(blocks.pool.match_prefix(hashes))


def test_as_many_blocks_are_registered_at_a_time_as_was_said(blocks):
    arrived(blocks)
    seen = []
    for _ in range(5):
        seen.append(num_findable(blocks))
        blocks.catch_up(3)
    assert seen == [0, 3, 6, 9, NUM_FULL]


def test_what_one_sequence_leaves_of_the_number_goes_to_the_next(blocks):
    first, second = arrived(blocks, 1), arrived(blocks, 2)  # the second finds the first's blocks
    assert second.num_registered_blocks == NUM_FULL
    assert first.num_registered_blocks == NUM_FULL
    third = new_sequence(3)
    third.token_ids = [token + 1 for token in PROMPT]
    assert blocks.take(third, 0)
    third.num_computed_tokens = len(PROMPT)
    blocks.register_later(third)
    blocks.catch_up(NUM_FULL)
    assert third.num_registered_blocks == NUM_FULL
    blocks.check([first, second, third])


def test_whoever_looks_for_a_prefix_finds_all_of_it(blocks):
    arrived(blocks)
    follower = new_sequence(2)
    assert blocks.take(follower, 0)
    assert follower.num_cached_tokens == NUM_FULL * BLOCK_SIZE


def test_a_sequence_freed_before_its_turn_leaves_its_blocks_in_the_cache(blocks):
    sequence = arrived(blocks)
    blocks.free(sequence)
    assert num_findable(blocks) == NUM_FULL
    assert blocks.pool.num_held == 0
    blocks.catch_up()
    blocks.check([])


def test_blocks_filled_meanwhile_are_not_registered_before_those_in_front_of_them(blocks):
    sequence = arrived(blocks)
    blocks.catch_up(2)
    sequence.token_ids += [1, 2, 3]
    blocks.grow(sequence)
    sequence.num_computed_tokens = (NUM_FULL + 1) * BLOCK_SIZE
    blocks.register(sequence)
    assert sequence.num_registered_blocks == 2
    blocks.catch_up(NUM_FULL)
    assert sequence.num_registered_blocks == NUM_FULL + 1
