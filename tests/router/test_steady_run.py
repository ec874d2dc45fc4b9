"""Steady decode takes a shorter way through the core; nobody can tell by what comes out.

Two cores hear the same of the same cluster: one as steps of the rows before, the other always as whole
batches of fresh lists, which never are steady.
"""

from collections.abc import Sequence
from random import Random

import pytest

from kvrelay.codec.cluster import TokenBatchDecoder, TokenBatchEncoder
from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import AttemptFailed, AttemptFinished, NodeLoad, ReleaseKV, Report, TokenBatch
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.router.events import DeliverFailed, DeliverTokens, Effect, SendCommand
from kvrelay.router.steady_run import MAX_UNWRITTEN_STEPS

from .conftest import Transcript, batch

KINDS = ("start", "start", "finish", "fail", "cancel", "close", "repeat", "skip", "burst", "load", "intrude")


class TwoCores:
    """`steady` and `plain`, and one decode node d1 whose rows are the attempts that decode there."""

    def __init__(self) -> None:
        self.steady, self.plain = Transcript(), Transcript()
        # To look at an output has it written: only where a test says so.
        self.steady.checks_invariants = self.plain.checks_invariants = False
        self.encoder, self.decoder = TokenBatchEncoder(), TokenBatchDecoder()
        self.next_indices: dict[int, int] = {}
        self.num_attempts = self.num_short_ways = 0
        self.last_rows: list[int] | None = None
        self.released: set[int] = set()

    def both(self, method: str, *args: object, **kwargs: object) -> None:
        """Tell both the same, and compare what they answer."""
        for core in (self.steady, self.plain):
            getattr(core, method)(*args, **kwargs)
        self._compare()

    def start(self, number: int, session: int, max_tokens: int = 10_000) -> None:
        """A request whose first token is out."""
        name = f"r{number}"
        self.both("submit", name, session=session, stream_id=number, max_tokens=max_tokens)
        self.num_attempts += 1
        self.both("first_token", self.num_attempts)
        self.next_indices[self.num_attempts] = 1

    def step(
        self,
        *reports: Report,
        tokens: TokenBatch | None = None,
        logprobs: Sequence[TokenLogprobs | None] = (),
    ) -> None:
        """A frame of d1: one token for each attempt, unless told otherwise."""
        if tokens is None:
            tokens = batch(*((attempt, index, (index % 97,)) for attempt, index in self.next_indices.items()))
            tokens.logprobs = logprobs
            self.next_indices = {attempt: index + 1 for attempt, index in self.next_indices.items()}
        decoded = self.decoder.decode(self.encoder.encode(tokens))
        self.steady.report("d1", *reports, tokens=decoded)
        self.plain.report("d1", *reports, tokens=tokens)
        self.leave(*self.released)
        self.released.clear()
        self._compare()
        self._note_way()

    def check_invariants(self) -> None:
        self.steady.core.check_invariants()
        self.plain.core.check_invariants()

    def leave(self, *attempts: int) -> None:
        for attempt in attempts:
            self.next_indices.pop(attempt, None)

    def _compare(self) -> None:
        assert plainly(self.steady.effects) == plainly(self.plain.effects)
        assert self.steady.core.status(0.0).counters == self.plain.core.status(0.0).counters
        for effect in self.steady.effects:
            if isinstance(effect, SendCommand) and isinstance(effect.command, ReleaseKV):
                # The node hears of it after the step that is on its way.
                self.released.add(effect.command.attempt)

    def _note_way(self) -> None:
        delivered = [effect for effect in self.steady.effects if isinstance(effect, DeliverTokens)]
        rows = delivered[0].stream_ids if delivered else None
        self.num_short_ways += rows is not None and rows is self.last_rows
        self.last_rows = rows


def plainly(effects: list[Effect]) -> list[object]:
    """Effects that can be compared: an error is one by its code and text."""
    return [
        (effect.session, effect.stream_id, effect.error.code, effect.error.message)
        if isinstance(effect, DeliverFailed)
        else effect
        for effect in effects
    ]


@pytest.fixture
def cores() -> TwoCores:
    """Three requests of two sessions decode on d1, steadily."""
    made = TwoCores()
    made.both("attach", "p1", "d1", max_num_seqs=64, num_blocks=4096, max_model_len=20_000)
    for number, session in ((1, 1), (2, 2), (3, 1)):
        made.start(number, session)
    for _ in range(4):
        made.step()
    assert made.num_short_ways > 0
    return made


def test_to_explain_a_request_says_the_same_and_leaves_the_short_way_open(cores: TwoCores) -> None:
    for _ in range(3):
        cores.step()
        num_short_ways = cores.num_short_ways
        steady, plain = (made.core.explain("r2", 0.0) for made in (cores.steady, cores.plain))
        assert steady == plain
        assert steady.measured.num_output_tokens == cores.next_indices[2]
        cores.step()
        assert cores.num_short_ways == num_short_ways + 1


@pytest.mark.parametrize("seed", range(40))
def test_a_steady_core_says_what_a_plain_one_says_whatever_happens(seed: int) -> None:
    rng, cores = Random(seed), TwoCores()
    cores.both("attach", "p1", "d1", max_num_seqs=64, num_blocks=4096, max_model_len=20_000)
    for number in range(1, 5):
        cores.start(number, rng.randint(1, 3))
    for number in range(5, 120):
        if rng.random() < 0.2:
            _disturb(cores, rng, number)
            if rng.random() < 0.3:
                cores.check_invariants()
        else:
            cores.step()
    assert cores.num_short_ways > 5
    cores.check_invariants()


def _disturb(cores: TwoCores, rng: Random, number: int) -> None:
    attempts = list(cores.next_indices)
    attempt = rng.choice(attempts) if attempts else 0
    index = cores.next_indices.get(attempt, 0)
    kind = rng.choice(KINDS)
    if kind == "start" or not attempts:
        cores.start(number, rng.randint(1, 3), max_tokens=rng.choice([12, 10_000]))
    elif kind == "finish":
        cores.leave(attempt)
        finished = AttemptFinished(AttemptId(attempt), FinishReason.STOP)
        cores.step(finished, tokens=batch((attempt, index, (7,))))
    elif kind == "fail":
        cores.leave(attempt)
        cores.step(AttemptFailed(AttemptId(attempt), "INVALID_REQUEST", "no"), tokens=batch())
    elif kind == "cancel":
        cores.both("cancel", f"r{rng.randint(1, number)}")
    elif kind == "close":
        cores.both("close_session", rng.randint(1, 3))
    elif kind == "repeat":
        cores.step(tokens=batch((attempt, max(0, index - 1), (3,))))
    elif kind == "skip":
        cores.leave(attempt)
        cores.step(tokens=batch((attempt, index + 1, (3,))))
    elif kind == "burst":
        cores.next_indices[attempt] += 2
        cores.step(tokens=batch((attempt, index, (3, 4))))
    elif kind == "intrude":
        cores.both("tokens", "p1", attempt, index - rng.randint(0, 1), 3)
    else:
        cores.both("report", "d1", load=NodeLoad(num_running=number))


def test_more_steps_than_are_kept_unwritten_are_all_in_the_continuation(cores: TwoCores) -> None:
    for _ in range(MAX_UNWRITTEN_STEPS + 5):
        cores.step()
    assert cores.num_short_ways > MAX_UNWRITTEN_STEPS
    # Both cores' next commands hold all that was delivered, and are compared.
    cores.both("lose", "d1")
    cores.both("attach", "d2", max_num_seqs=64, num_blocks=4096, max_model_len=20_000)
    sent = [str(effect) for effect in cores.steady.effects]
    assert sum("ReserveDecode" in command for command in sent) == 3


def test_a_steady_stream_is_still_stopped_at_max_tokens() -> None:
    cores = TwoCores()
    cores.both("attach", "p1", "d1", num_blocks=4096, max_model_len=20_000)
    cores.start(1, session=1, max_tokens=6)
    for _ in range(6):
        cores.step()
    assert cores.num_short_ways > 0
    assert cores.steady.core.status(0.0).counters.num_tokens_delivered == 6
    assert cores.steady.core.status(0.0).counters.num_tokens_dropped == 1


def test_nothing_is_delivered_of_an_attempt_that_was_cancelled_in_steady_decode(cores: TwoCores) -> None:
    cores.both("cancel", "r2")
    cores.step()
    delivered = [effect for effect in cores.steady.effects if isinstance(effect, DeliverTokens)]
    assert [effect.stream_ids for effect in delivered] == [[1, 3]]


def test_an_attempt_named_twice_is_never_steady(cores: TwoCores) -> None:
    """One step further the first of its rows says what the second has said."""
    cores.step(tokens=batch((4, 0, (5,)), (4, 1, (6,))))  # of an attempt that is yet to come
    cores.start(4, session=1)
    for index in range(1, 5):
        cores.step(tokens=batch((4, index, (5,)), (4, index + 1, (6,))))
    assert len(cores.steady.delivered[1, 4]) == 6


def test_a_row_of_an_attempt_that_is_not_there_is_dropped_step_after_step(cores: TwoCores) -> None:
    cores.next_indices[77] = 1
    for _ in range(4):
        cores.step()
    assert cores.steady.core.status(0.0).counters.num_tokens_dropped == 4


@pytest.mark.parametrize("ahead", [-1, 0, 1])
def test_what_another_node_says_of_a_steady_attempt_is_merged_with_it(cores: TwoCores, ahead: int) -> None:
    cores.step()
    cores.both("tokens", "p1", 1, cores.next_indices[1] + ahead, 5)
    for _ in range(3):
        cores.step()
    cores.check_invariants()


def test_logprobs_are_delivered_in_steady_decode_too(cores: TwoCores) -> None:
    for has_logprobs in (True, False, True, False, False):
        cores.step(logprobs=[TokenLogprobs(-1.0), None, TokenLogprobs(-2.0)] if has_logprobs else [])


@pytest.mark.parametrize("token_id", [-1, 2**31])
def test_a_token_id_out_of_range_is_the_nodes_fault_in_steady_decode_too(
    cores: TwoCores, token_id: int
) -> None:
    rows = batch(*((attempt, index, (1,)) for attempt, index in cores.next_indices.items()))
    steady = cores.decoder.decode(cores.encoder.encode(rows))
    assert steady.step > 0
    steady.token_ids = [1, token_id, 1]
    cores.steady.report("d1", tokens=steady)
    assert not any(isinstance(effect, DeliverTokens) for effect in cores.steady.effects)
    assert cores.steady.core.status(0.0).counters.num_faulty_frames == 1
