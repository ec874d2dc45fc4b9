"""Lengths that prefill attention is padded to and cut into."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.engine.cuda.attention_lengths import LADDER_FROM, ladder, padded_length, pieces

SIZES = (8192, 4096, 2048, 1024, 512, 256)


@given(st.integers(LADDER_FROM, 1 << 20))
def test_padding_is_an_eighth_at_the_most(length: int) -> None:
    assert length <= padded_length(length) <= length * 9 / 8


@given(st.integers(1, 40_000), st.data())
def test_every_length_up_to_the_longest_is_padded_to_one_of_the_ladder(
    longest: int, data: st.DataObject
) -> None:
    lengths = ladder(longest)
    assert lengths == sorted(set(lengths))
    if longest >= LADDER_FROM:
        assert padded_length(data.draw(st.integers(LADDER_FROM, longest))) in lengths
    else:
        assert not lengths


def test_the_ladder_is_short() -> None:
    assert len(ladder(8192)) == 25


@given(st.integers(0, 300))
def test_pieces_cover_the_length_once(num_units: int) -> None:
    length = num_units * SIZES[-1]
    found = list(pieces(length, SIZES))
    assert [index for piece in found for index in range(piece.start, piece.stop)] == list(range(length))
    assert all(piece.stop - piece.start in SIZES for piece in found)


@pytest.mark.parametrize("length", [LADDER_FROM, 2048, 4096, 8192, 16384])
def test_powers_of_two_are_not_padded(length: int) -> None:
    assert padded_length(length) == length
