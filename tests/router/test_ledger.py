"""The ledger's transition table: exactly the moves of the design."""

from itertools import product

import pytest

from kvrelay.core.ids import RequestId
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.router.events import SessionId
from kvrelay.router.ledger import TRANSITIONS, RequestEntry, RequestState
from kvrelay.router.output_merge import OutputMerge

MOVES = {
    "queued": "prefilling done failed",
    "prefilling": "handing_off queued done failed",
    "handing_off": "decoding queued done failed",
    "decoding": "queued done failed",
    "done": "",
    "failed": "",
}


def entry_in(state: RequestState) -> RequestEntry:
    request = TokenRequest((1,), 1, SamplingParams())
    merge = OutputMerge(SessionId(1), 1, 0, 256, 16)
    return RequestEntry(1, RequestId("r"), SessionId(1), 1, "m", request, 0.0, 1.0, merge, state)


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(RequestState)


@pytest.mark.parametrize(("before", "after"), list(product(RequestState, RequestState)))
def test_only_the_moves_of_the_table_are_possible(before: RequestState, after: RequestState) -> None:
    entry = entry_in(before)
    if after.value in MOVES[before.value].split():
        entry.move_to(after)
        assert entry.state is after
    else:
        with pytest.raises(AssertionError):
            entry.move_to(after)
