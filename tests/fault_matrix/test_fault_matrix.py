"""Some cells of the fault matrix, one of each kind of fault; `make fault-matrix` plays them all. And what is
not as it should be shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvrelay.core.errors import NodeUnavailable
from kvrelay.core.sampling import SamplingParams
from tests.fault_matrix.caller import Caller
from tests.fault_matrix.cell import CellResult
from tests.fault_matrix.faults import FAULTS
from tests.fault_matrix.impossible import why_impossible
from tests.fault_matrix.page import GREEN, IMPOSSIBLE, RED, UNPLAYED, Figures, markdown, verdicts_of
from tests.fault_matrix.play import Player
from tests.fault_matrix.states import STATES

PAGE = Path(__file__).parents[2] / "docs" / "fault-matrix.md"
CELLS = [
    ("queued", "kill_prefill"),
    ("waiting", "cut_decode_stream"),
    ("prefilling", "drain_prefill"),
    ("transferring", "kill_decode"),
    ("transferring", "client_leaves"),
    ("first_token", "kill_prefill"),
    ("pulling", "cut_kv"),
    ("decoding", "kill_router"),
    ("decoding", "cut_client"),
    ("proxied", "kill_proxy"),
    ("finished", "kill_prefill"),
    ("cancelled", "kill_decode"),
]
STATE_OF = {state.key: state for state in STATES}
FAULT_OF = {fault.key: fault for fault in FAULTS}
GREEN_CELL = CellResult("decoding", "kill_decode", "60 of 60 tokens, as unbroken", "", 1, 2, 0.1, 1.0, 0)


@pytest.mark.cluster
@pytest.mark.model
async def test_whatever_breaks_the_client_gets_the_unbroken_answer_and_nothing_leaks(tmp_path: Path) -> None:
    player = Player(tmp_path, seed=1, tell=lambda _: None)
    cells = [(STATE_OF[state], FAULT_OF[fault]) for state, fault in CELLS]
    results = await player.play(cells, num_lanes=2)
    assert [result for result in results if not result.is_green] == []
    assert len(results) == len(CELLS)


def test_the_published_matrix_is_complete_and_green() -> None:
    verdicts = verdicts_of(PAGE.read_text())
    expected = {
        f"{state.title} x {fault.title}": IMPOSSIBLE if why_impossible(state.key, fault.key) else GREEN
        for state in STATES
        for fault in FAULTS
    }
    assert verdicts == expected


def _verdict(result: CellResult) -> str:
    page = markdown(Figures((result,), 1.0, 0))
    return verdicts_of(page)[f"{STATE_OF[result.state].title} x {FAULT_OF[result.fault].title}"]


def test_a_red_cell_shows_red_and_one_that_was_not_played_does_not_pass_for_green() -> None:
    assert _verdict(GREEN_CELL) == GREEN
    assert _verdict(replace(GREEN_CELL, complaint="wrong tokens")) == RED.split(" ")[0]
    others = verdicts_of(markdown(Figures((), 1.0, 0)))
    assert set(others.values()) == {UNPLAYED, IMPOSSIBLE}


def _caller(tokens: list[int]) -> Caller:
    caller = Caller(None, "it", (1, 2), SamplingParams(max_tokens=3), (7, 8, 9))  # type: ignore[arg-type]
    caller.pieces = [*tokens]
    caller.ended.set()
    return caller


def test_a_client_complains_of_wrong_missing_and_doubled_tokens_errors_and_silence() -> None:
    assert _caller([7, 8, 9]).complaint() == ""
    for tokens in ([7, 8], [7, 8, 8], [7, 8, 8, 9], []):
        assert _caller(tokens).complaint() == "wrong tokens"
    failed, hanging, left = _caller([7]), _caller([7]), _caller([8])
    failed.error = NodeUnavailable("gone")
    hanging.ended.clear()
    left.has_left = True
    assert "NODE_UNAVAILABLE" in failed.complaint()
    assert "hangs" in hanging.complaint()
    assert left.complaint() == "wrong tokens"


def test_a_pause_counts_from_the_fault_and_the_first_token_ends_it() -> None:
    caller = _caller([7, 8, 9])
    caller.arrivals_s, caller.ended_s = [1.0, 4.0, 4.5], 4.5
    assert caller.longest_pause_s(3.0) == 1.0
    assert caller.longest_pause_s(1.5) == 2.5
    assert caller.longest_pause_s(5.0) is None
