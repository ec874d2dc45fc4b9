"""What prefills and pulls take is learned from reports alone."""

from random import Random

import numpy as np
import pytest

from kvrelay.router.congestion import Congestion
from kvrelay.router.learned_costs import PrefillCosts, PullCosts
from kvrelay.router.online_fit import OnlineFit


def teach(costs: PrefillCosts, num: int, noise: float = 0.0, factors: tuple[float, ...] = (1.0,)) -> None:
    rng = Random(4)
    for number in range(num):
        slot = number % len(factors)
        new, cached = rng.randrange(50, 20_000), rng.randrange(0, 20_000)
        seconds = 0.02 + 6e-5 * new + 3e-9 * new * (cached + new / 2)
        costs.observe(slot, ((new, cached),), factors[slot] * seconds * rng.uniform(1 - noise, 1 + noise))


def test_a_model_far_from_the_prior_is_learned() -> None:
    approx_s = 0.02 + 6e-5 * 4000 + 3e-9 * 4000 * 6000
    costs = PrefillCosts(1)
    teach(costs, 200)
    assert costs.seconds(8000, np.array([4000]))[0] == pytest.approx(approx_s, rel=0.01)


def test_noise_and_single_stalls_do_not_upset_it() -> None:
    costs = PrefillCosts(1)
    teach(costs, 300, noise=0.1)
    before = costs.seconds(8000, np.array([0]))[0]
    costs.observe(0, ((5000, 0),), 500.0)
    assert costs.seconds(8000, np.array([0]))[0] == pytest.approx(before, rel=0.2)


def test_a_slow_node_is_told_from_the_others() -> None:
    costs = PrefillCosts(3)
    teach(costs, 300, factors=(1.0, 1.0, 2.5))
    quick, alike, slow = costs.seconds(4000, np.zeros(3, np.int64))
    assert quick == pytest.approx(alike, rel=0.05)
    assert slow / quick == pytest.approx(2.5, rel=0.1)


def test_pulls_of_nothing_take_nothing() -> None:
    costs = PullCosts()
    for tokens in (500, 1000, 4000, 9000) * 20:
        costs.observe(tokens, 0.001 + 2e-6 * tokens)
    seconds = costs.seconds(np.array([0, 5000]))
    assert seconds[0] == 0.0
    assert seconds[1] == pytest.approx(0.011, rel=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_exact_observations_without_end_spoil_nothing(seed: int) -> None:
    fit, rng = OnlineFit((0.005, 2.5e-5, 1e-9), 1e-4), Random(seed)
    for _ in range(8000):
        new, cached = rng.randrange(1, 3600), 512 * rng.randrange(40)
        features = (1.0, float(new), new * (cached + new / 2))
        fit.observe(features, 0.005 + 2.302e-5 * features[1] + 7.99e-10 * features[2])
    assert fit.expected((1.0, 2000.0, 2e7)) == pytest.approx(0.005 + 0.04604 + 0.01598, rel=0.01)


def test_a_model_that_is_lost_is_started_anew() -> None:
    fit = OnlineFit((1.0, 1.0), 1e-6)
    for _ in range(200):
        fit.observe((1.0, 1.0), 1e6)
    for _ in range(400):
        fit.observe((1.0, 1.0), 1e-3)
    assert fit.expected((1.0, 1.0)) < 0.1


def test_what_is_no_time_is_ignored() -> None:
    fit = OnlineFit((1.0, 1.0), 1e-6)
    for bad in (-1.0, float("nan"), float("inf")):
        fit.observe((1.0, 2.0), bad)
    assert fit.num_observed == 0


def test_work_costs_others_nothing_while_nobody_waits_and_more_the_busier_nodes_are() -> None:
    calm, busy = Congestion(), Congestion()
    for second in range(200):
        calm.note_work(1.0, 4, float(second))
        busy.note_work(3.6, 4, float(second))
    assert calm.weight(0, 4) == busy.weight(0, 4) == 0.0
    assert busy.weight(8, 4) > 3 * calm.weight(8, 4) > 0.0
