"""Streamed text ends where the whole text would, whatever the cuts, and shows nothing of a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrelay.client.stop_strings import StopStrings

THOROUGH = settings(max_examples=500, deadline=None)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)
PARTS = st.lists(st.text("abc", max_size=5), max_size=12)
MIN_TOKENS = st.integers(0, 6)


def expected(
    parts: Sequence[str], stops: Sequence[str], min_tokens: int, include_stop: bool
) -> tuple[str, str | None]:
    """The text that is shown, and the stop string: every place of the whole text is tried."""
    whole, num_free_chars = "".join(parts), len("".join(parts[:min_tokens]))
    found = [
        (end, start, whole[start:end])
        for end in range(num_free_chars + 1, len(whole) + 1)
        for start in range(end)
        if whole[start:end] in stops
    ]
    if not found:
        return whole, None
    end, start, stop = min(found)
    return whole[: end if include_stop else start], stop


def stream(stops: StopStrings, parts: Sequence[str]) -> list[str]:
    """One part a token; the last entry is what the end gave out."""
    shown: list[str] = []
    for number, part in enumerate(parts, 1):
        shown.append(stops.push(part, number))
        if stops.matched is not None:
            return shown
    return [*shown, stops.flush()]


@THOROUGH
@given(parts=PARTS, stops=STOPS, min_tokens=MIN_TOKENS, include_stop=st.booleans())
@example(parts=["ab", "c"], stops=["abc", "bc", "c"], min_tokens=0, include_stop=False)
@example(parts=["a", "b"], stops=["ab"], min_tokens=1, include_stop=False)
@example(parts=["a", "b"], stops=["ab"], min_tokens=2, include_stop=True)
def test_any_cut_shows_what_the_whole_text_would(
    parts: list[str], stops: list[str], min_tokens: int, include_stop: bool
) -> None:
    finder = StopStrings(stops, include_stop=include_stop, min_tokens=min_tokens)
    shown = "".join(stream(finder, parts))
    assert (shown, finder.matched) == expected(parts, stops, min_tokens, include_stop)


@THOROUGH
@given(text=st.text("abc", max_size=30), stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_cutting_the_same_text_otherwise_changes_nothing(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(edges)]
    cut, whole = StopStrings(stops), StopStrings(stops)
    assert "".join(stream(cut, parts)) == "".join(stream(whole, [text]))
    assert cut.matched == whole.matched


@THOROUGH
@given(parts=PARTS, stops=STOPS)
def test_text_is_held_back_only_while_a_stop_string_may_have_begun(
    parts: list[str], stops: list[str]
) -> None:
    finder, pushed, shown = StopStrings(stops), "", ""
    for number, part in enumerate(parts, 1):
        pushed += part
        shown += finder.push(part, number)
        if finder.matched is not None:
            return
        held = pushed.removeprefix(shown)
        assert pushed == shown + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        (["so", " ", "END"], ["so", " ", ""]),
        (["EN", "ough"], ["", "ENough", ""]),
        (["E", "N"], ["", "", "EN"]),
    ],
)
def test_text_waits_until_it_is_known_not_to_stop(parts: list[str], shown: list[str]) -> None:
    assert stream(StopStrings(["END"]), parts) == shown
