"""The sampler does what `SamplingParams` promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.core.sampling import Grammar, GrammarKind, SamplingParams
from kvrelay.engine.executor import DrawFailed, DrawnToken
from kvrelay.engine.noise import gumbel_noise, stream_key
from kvrelay.engine.sampler import DrawRequest, draw

MASK = (1 << 64) - 1


def draw_ids(logits, *sampling, token_ids=(1, 2, 3), num_prompt_tokens=3):
    requests = [DrawRequest(params, token_ids, num_prompt_tokens) for params in sampling]
    return [result.token_id for result in draw(logits.clone(), requests)]


def shares(row, num_draws=4000, **sampling):
    """How often each token is drawn over many seeds."""
    params = [SamplingParams(seed=seed, **sampling) for seed in range(num_draws)]
    ids = draw_ids(row.expand(num_draws, -1), *params)
    return torch.bincount(torch.tensor(ids), minlength=len(row)) / num_draws


def test_greedy_takes_the_likeliest_token():
    assert draw_ids(torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 2.0]]), SamplingParams(), SamplingParams()) == [
        1,
        0,
    ]


def test_draws_follow_the_softmax():
    row = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = torch.softmax(row / 0.7, 0)
    assert torch.allclose(shares(row, temperature=0.7), expected, atol=0.03)


def test_top_k_keeps_the_k_likeliest():
    row = torch.linspace(0, 1, 50)
    found = shares(row, temperature=5.0, top_k=3)
    assert found.nonzero().flatten().tolist() == [47, 48, 49]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert shares(row, temperature=1.0, top_p=0.79).nonzero().flatten().tolist() == [0, 1]
    assert shares(row, temperature=1.0, top_p=0.81).nonzero().flatten().tolist() == [0, 1, 2]
    assert shares(row, temperature=1.0, top_p=1e-6).nonzero().flatten().tolist() == [0]


def test_top_p_counts_within_what_top_k_left():
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = shares(row, temperature=1.0, top_k=2, top_p=0.6)
    assert found.nonzero().flatten().tolist() == [0, 1], "0.4 / 0.7 is below 0.6"


def test_top_p_wider_than_the_first_guess_equals_a_full_sort():
    row = torch.sin(torch.arange(4000.0))
    wide = shares(row, 300, temperature=100.0, top_p=0.9)
    assert len(wide.nonzero()) > 200
    limit = row.sort(descending=True).values[int(4000 * 0.91)]
    assert float(row[wide.nonzero().flatten()].min()) >= float(limit)


def test_min_p_drops_what_is_far_below_the_likeliest():
    row = torch.tensor([0.6, 0.3, 0.06, 0.04]).log()
    assert shares(row, temperature=1.0, min_p=0.2).nonzero().flatten().tolist() == [0, 1]


def test_penalties_change_the_logits_as_documented():
    logits = torch.tensor([[2.0, -1.0, 1.9, 0.0, -0.9]])
    prompt_and_outputs = (1, 0, 0, 3)  # the prompt is (1,), outputs 0, 0, 3

    def best(**sampling):
        return draw_ids(
            logits, SamplingParams(**sampling), token_ids=prompt_and_outputs, num_prompt_tokens=1
        )[0]

    assert best() == 0
    assert best(repetition_penalty=1.04) == 0
    assert best(repetition_penalty=1.06) == 2, "2.0 / 1.06 < 1.9"
    assert best(presence_penalty=0.09) == 0
    assert best(presence_penalty=0.11) == 2
    assert best(frequency_penalty=0.049) == 0
    assert best(frequency_penalty=0.051) == 2, "counted twice"


def test_prompt_tokens_have_repetition_but_no_presence_penalty():
    logits = torch.tensor([[2.0, 1.9]])
    for sampling, expected in (
        ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, 0),
        ({"repetition_penalty": 2.0}, 1),
    ):
        assert draw_ids(logits, SamplingParams(**sampling), token_ids=(0,), num_prompt_tokens=1) == [expected]


def test_logprobs_are_of_the_raw_logits():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    params = SamplingParams(num_logprobs=2, repetition_penalty=50.0, temperature=0.3, seed=1)
    [result] = draw(logits.clone(), [DrawRequest(params, (2,), 1)])
    expected = torch.log_softmax(logits[0].double(), 0)
    assert result.logprobs.chosen == pytest.approx(float(expected[result.token_id]))
    assert [token_id for token_id, _ in result.logprobs.top] == [2, 1]
    assert result.logprobs.top[0][1] == pytest.approx(float(expected[2]))
    [bare] = draw(logits.clone(), [DrawRequest(SamplingParams(num_logprobs=0), (2,), 1)])
    assert bare.logprobs.top == ()


def test_biases_are_added_to_the_raw_logits_before_penalties():
    logits = torch.tensor([[3.0, 1.0, 0.0]])
    assert draw_ids(logits, SamplingParams(logit_bias=((1, 1.9),))) == [0]
    assert draw_ids(logits, SamplingParams(logit_bias=((0, -100.0), (1, -100.0)))) == [2]
    biased = SamplingParams(logit_bias=((1, 3.0),), repetition_penalty=2.0)
    assert draw_ids(logits, biased, token_ids=(1,), num_prompt_tokens=1) == [0], "(1 + 3) / 2 < 3"
    found = shares(logits[0], temperature=1.0, logit_bias=((0, -2.0),))
    assert torch.allclose(found, torch.softmax(torch.tensor([1.0, 1.0, 0.0]), 0), atol=0.03)


def draw_allowed(logits, allowed, **sampling):
    return draw(logits.clone(), [DrawRequest(SamplingParams(**sampling), (1, 2), 1, allowed)])[0]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 9.0, "top_k": 4}])
def test_only_allowed_tokens_are_drawn_whatever_biases_and_penalties_say(sampling):
    logits, allowed = torch.tensor([[9.0, 0.0, 1.0, 5.0]]), torch.tensor([False, True, True, False])
    for seed in range(50):
        changes = {**sampling, "logit_bias": ((0, 100.0),), "presence_penalty": -2.0}
        assert draw_allowed(logits, allowed, **{**changes, "seed": seed}).token_id in (1, 2)


def test_top_p_and_min_p_count_among_the_allowed_tokens():
    logits, allowed = torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([False, True, True])
    for cut, kept in (({"top_p": 0.9}, {1, 2}), ({"top_p": 0.7}, {1}), ({"min_p": 0.2}, {1, 2})):
        drawn = {
            draw_allowed(logits, allowed, temperature=1.0, seed=seed, **cut).token_id for seed in range(200)
        }
        assert drawn == kept


def test_a_mask_does_not_change_the_noise_of_what_it_allows():
    logits = torch.sin(torch.arange(300.0)).view(1, 300)
    for seed in range(30):
        free = draw_allowed(logits, None, temperature=2.0, seed=seed).token_id
        allowed = torch.arange(300) >= free
        assert draw_allowed(logits, allowed, temperature=2.0, seed=seed).token_id == free


def test_logprobs_know_nothing_of_biases_and_masks():
    logits = torch.tensor([[3.0, 1.0, 0.0]])
    changes = {"num_logprobs": 3, "logit_bias": ((1, 50.0),)}
    result = draw_allowed(logits, torch.tensor([False, True, True]), **changes)
    expected = torch.log_softmax(logits[0].double(), 0)
    assert result.token_id == 1
    assert result.logprobs.chosen == pytest.approx(float(expected[1]))
    assert [token_id for token_id, _ in result.logprobs.top] == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_may_draw_nothing_fails_alone_and_says_what_is_at_fault(temperature):
    plain = SamplingParams(temperature=temperature, seed=1, min_tokens=2)
    bound = replace(plain, grammar=Grammar(GrammarKind.JSON_OBJECT))
    nothing, stuck = torch.zeros(5, dtype=torch.bool), DrawFailed("too many states", "sampling.grammar")
    rows = [(plain, None), (plain, nothing), (bound, nothing), (bound, stuck), (plain, None)]
    results = draw(torch.zeros(5, 5), [DrawRequest(item, (1,), 1, allowed) for item, allowed in rows])
    assert isinstance(results[0], DrawnToken)
    assert isinstance(results[4], DrawnToken)
    assert [result.field for result in results[1:4]] == [
        "sampling.min_tokens",
        "sampling.grammar",
        "sampling.grammar",
    ]
    assert results[3] is stuck


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unsound_logits_fail_that_sequence_alone(bad, temperature):
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    params = SamplingParams(temperature=temperature, seed=1)
    good, failed = draw(logits, [DrawRequest(params, (1,), 1)] * 2)
    assert isinstance(failed, DrawFailed)
    assert not isinstance(good, DrawFailed)


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**63 - 1),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(SAMPLING, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_is_drawn_alike_alone_and_in_any_batch(params, variant):
    logits = torch.sin(torch.arange(len(params) * 300.0).view(len(params), 300) * (1 + variant)) * 3
    together = draw_ids(logits, *params)
    alone = [draw_ids(logits[index : index + 1], item)[0] for index, item in enumerate(params)]
    assert together == alone


def reference_noise(seed, position, token_id):
    """SplitMix64 in plain integers."""

    def mix(value):
        value &= MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return value ^ (value >> 31)

    step = 0x9E3779B97F4A7C15
    key = mix(mix(seed * step + 1) + position * step)
    uniform = ((mix(token_id * step + key) >> 12) + 0.5) * 2.0**-52
    return -math.log(-math.log(uniform))


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 200_000))
def test_noise_is_the_documented_function_of_seed_position_and_token(seed, position, token_id):
    noise = gumbel_noise(stream_key(seed, position), torch.tensor([token_id]))
    assert float(noise) == pytest.approx(reference_noise(seed, position, token_id), rel=1e-12)


def test_noise_has_the_moments_of_a_gumbel_distribution():
    noise = torch.cat([gumbel_noise(stream_key(7, position), torch.arange(50_000)) for position in range(4)])
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert torch.isfinite(noise).all()
