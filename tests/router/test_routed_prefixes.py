"""Prompts on their way count as cached where they go, as far as they go together."""

import numpy as np

from kvrelay.core.ids import AttemptId
from kvrelay.router.routed_prefixes import RoutedPrefixes


def blocks(routed: RoutedPrefixes, keys: list[int], held: tuple[int, ...] = (0, 0)) -> list[int]:
    counts = np.array(held, np.int64)
    routed.raise_blocks(counts, keys)
    return counts.tolist()  # type: ignore[no-any-return]


def test_the_longest_chain_that_is_on_its_way_counts() -> None:
    routed = RoutedPrefixes()
    routed.add(AttemptId(1), 0, [1, 2, 3, 4, 5])
    routed.add(AttemptId(2), 0, [1, 2, 9])
    routed.add(AttemptId(3), 1, [7, 8])
    assert blocks(routed, [1, 2, 3, 6]) == [3, 0]
    assert blocks(routed, [1, 2, 3, 4, 5, 6]) == [5, 0]
    assert blocks(routed, [7]) == [0, 1]
    assert blocks(routed, [5, 6]) == [0, 0]
    assert blocks(routed, []) == [0, 0]
    assert blocks(routed, [1, 2, 3], (3, 1)) == [3, 1], "what is held already is not lessened"


def test_what_was_computed_counts_no_more() -> None:
    routed = RoutedPrefixes()
    routed.add(AttemptId(1), 0, [1, 2])
    routed.add(AttemptId(2), 0, [1, 2, 3])
    routed.remove(AttemptId(2), [1, 2, 3])
    assert blocks(routed, [1, 2, 3]) == [2, 0]
    routed.remove(AttemptId(1), [1, 2])
    assert blocks(routed, [1, 2, 3]) == [0, 0]
