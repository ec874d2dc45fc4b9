"""What steps and handoffs take is learned from what is seen of them."""

from random import Random

import numpy as np
import pytest

from kvrelay.core.ids import NodeId
from kvrelay.router.decode_costs import Factors, HandoffCosts, StepCosts
from kvrelay.router.step_timer import StepTimer

P1, P2 = NodeId("p1"), NodeId("p2")


def columns(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_a_step_is_learned_by_sequences_and_context_and_a_slow_node_shows() -> None:
    costs, rng = StepCosts(), Random(2)
    costs.factors.resize(2)
    for number in range(400):
        seqs, tokens = rng.randrange(1, 200), rng.randrange(1000, 300_000)
        seconds = 0.02 + 1e-4 * seqs + 1e-7 * tokens
        costs.observe(number % 2, seqs, tokens, seconds * (3.0 if number % 2 else 1.0))
    quick_s, slow_s = costs.seconds(columns(50, 50), columns(100_000, 100_000))
    assert slow_s / quick_s == pytest.approx(3.0, rel=0.1)
    more_s, _ = costs.seconds(columns(150, 150), columns(250_000, 250_000))
    assert more_s / quick_s == pytest.approx(0.06 / 0.035, rel=0.1)


def test_a_slow_link_is_told_from_the_others_by_pair() -> None:
    costs = HandoffCosts()
    for number in range(200):
        tokens = 100 + 37 * (number % 50)
        seconds = 0.01 + 1e-5 * tokens
        costs.observe(P1, 0, tokens, seconds)
        costs.observe(P1, 1, tokens, seconds * 10.0)
        costs.observe(P2, 1, tokens, seconds)
    from_p1, from_p2 = (costs.seconds(name, columns(1000, 1000)) for name in (P1, P2))
    assert from_p1[1] / from_p1[0] == pytest.approx(10.0, rel=0.2)
    assert from_p2[1] == pytest.approx(from_p1[0], rel=0.2)
    assert costs.seconds(P2, columns(1000, 0))[1] < from_p2[0], "what is held is not sent"


def test_a_pairs_first_handoff_which_connects_it_teaches_nothing() -> None:
    costs = HandoffCosts()
    before_s = costs.seconds(P1, columns(100, 100)).tolist()
    costs.observe(P1, 0, 100, 60.0)
    assert costs.seconds(P1, columns(100, 100)).tolist() == before_s


def test_a_node_that_takes_another_ones_slot_starts_anew() -> None:
    costs = HandoffCosts()
    for _ in range(50):
        costs.observe(P1, 0, 100, 10.0)
        costs.observe(P1, 1, 100, 0.1)
    costs.forget(0)
    first_s, second_s = costs.seconds(P1, columns(100, 100))
    assert first_s > second_s
    costs.forget(1)
    first_s, second_s = costs.seconds(P1, columns(100, 100))
    assert first_s == second_s


def test_one_stall_does_not_make_a_slow_node() -> None:
    factors = Factors()
    factors.resize(1)
    for _ in range(30):
        factors.observe(0, 1.0)
    factors.observe(0, 1000.0)
    assert factors.values[0] < 1.5


def test_only_gaps_between_steps_of_the_same_sequences_count() -> None:
    timer = StepTimer()
    timer.note_other(1.0)
    assert timer.mean_s is None
    timer.note_same(1.1)
    timer.note_same(1.3)
    timer.note_other(9.0)
    timer.note_same(9.3)
    assert timer.mean_s == pytest.approx(0.2)
    timer.reset()
    assert timer.mean_s is None
    timer.note_same(9.4)
    assert timer.mean_s == pytest.approx(0.1)
