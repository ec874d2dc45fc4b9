"""Modelled nodes against the same thing done token by token, and block by block."""

from random import Random

import pytest

from kvrelay.core.ids import AttemptId
from kvrelay.simulator.block_cache import BlockCache
from kvrelay.simulator.cost_model import DecodeModel, load_cost_model
from kvrelay.simulator.decode_node import DecodeJob, SimDecodeNode
from kvrelay.simulator.gap_times import GapTimes, Segment, own_percentile_s
from kvrelay.simulator.prefill_node import PrefillJob, SimPrefillNode

MODEL = DecodeModel((1, 4), (0.01, 0.016), 1e-5, kv_tokens=10_000, max_num_seqs=64)


def finish_times(arrivals: list[tuple[float, DecodeJob]]) -> dict[int, float]:
    """By the node."""
    node, ended = SimDecodeNode(0, MODEL, GapTimes()), {}
    waiting = list(arrivals)
    while waiting or node.due_s < float("inf"):
        if waiting and waiting[0][0] < node.due_s:
            at_s, job = waiting.pop(0)
            node.add(job, at_s)
        else:
            due_s = node.due_s
            ended.update({job.request: due_s for job in node.advance()})
    return ended


def finish_times_by_steps(arrivals: list[tuple[float, DecodeJob]]) -> dict[int, float]:
    """One step after another."""
    table = MODEL.batch_step_s()
    waiting = list(arrivals)
    running: list[list[int]] = []  # request, context, tokens left
    now_s, ended = 0.0, {}
    while waiting or running:
        if not running:
            now_s = max(now_s, waiting[0][0])
        while waiting and waiting[0][0] <= now_s:
            job = waiting.pop(0)[1]
            running.append([job.request, job.num_context_tokens, job.num_tokens])
        now_s += table[len(running)] + MODEL.context_token_s * sum(context for _, context, _ in running)
        for sequence in running:
            sequence[1] += 1
            sequence[2] -= 1
        ended.update({sequence[0]: now_s for sequence in running if not sequence[2]})
        running = [sequence for sequence in running if sequence[2]]
    return ended


@pytest.mark.parametrize("seed", range(5))
def test_whole_segments_end_sequences_when_single_steps_would(seed: int) -> None:
    def arrivals() -> list[tuple[float, DecodeJob]]:
        rng, at_s, jobs = Random(seed), 0.0, []
        for number in range(30):
            at_s += rng.expovariate(4.0)
            context, tokens = rng.randrange(10, 500), rng.randrange(1, 60)
            jobs.append((at_s, DecodeJob(AttemptId(number), number, context, tokens, 1, at_s)))
        return jobs

    by_segments, by_steps = finish_times(arrivals()), finish_times_by_steps(arrivals())
    assert by_segments == pytest.approx(by_steps)


def test_a_sequence_waits_until_its_kv_has_room() -> None:
    jobs = [(0.0, DecodeJob(AttemptId(n), n, 10, 20, 6000, 0.0)) for n in range(2)]
    ended = finish_times(jobs)
    assert ended[1] > 1.9 * ended[0]


def test_the_first_gap_holds_the_wait_for_the_handoff() -> None:
    node = SimDecodeNode(0, MODEL, GapTimes())
    node.add(DecodeJob(AttemptId(1), 1, 0, 3, 10, first_token_s=1.0), 1.5)
    (job,) = node.advance()
    first, *rest = node.gaps_of(job)
    assert first.num_gaps == 1
    assert first.gap_s == pytest.approx(0.5 + rest[0].gap_s)
    assert sum(segment.num_gaps for segment in rest) == 2


def test_percentiles_of_gaps_are_right_to_a_per_cent() -> None:
    gaps = GapTimes()
    gaps.add(0.01, 900)
    gaps.add(0.05, 100)
    assert gaps.percentile_s(90) == pytest.approx(0.01, rel=0.01)
    assert gaps.percentile_s(99) == pytest.approx(0.05, rel=0.01)
    assert gaps.mean_s == pytest.approx(0.014)
    assert own_percentile_s([Segment(99, 0.01), Segment(1, 0.4)], 99) == 0.01
    assert own_percentile_s([Segment(98, 0.01), Segment(2, 0.4)], 99) == 0.4


def test_a_full_cache_drops_what_was_used_longest_ago_and_ends_of_prompts_first() -> None:
    cache = BlockCache(4)
    assert cache.insert([1, 2]) == ([1, 2], [])
    assert cache.insert([3, 4]) == ([3, 4], [])
    assert cache.insert([1]) == ([], [])
    assert cache.insert([5]) == ([5], [2])
    assert cache.num_held([1, 2, 3]) == 1
    assert cache.insert(list(range(10, 16)))[0] == [10, 11, 12, 13], "what never fits is never stored"


def test_a_pull_takes_what_the_holder_still_has() -> None:
    costs = load_cost_model("independent")
    holder, node = (SimPrefillNode(number, 10, 512, costs) for number in range(2))
    holder.cache.insert([1, 2])
    job = PrefillJob(AttemptId(1), 0, 2000, [1, 2, 3, 4], 0.0, pull_from=holder, num_pull_blocks=3)
    done_s = node.add(job, 0.0)
    assert (job.num_cached_tokens, job.num_pulled_tokens) == (1024, 1024)
    assert done_s == pytest.approx(1024 * 131072 / 25e9 + costs.prefill.one(2000, 1024))


def test_the_independent_model_is_the_formula_it_names() -> None:
    prefill = load_cost_model("independent").prefill
    new, cached = 3000, 5000
    expected = 0.005 + (2 * 6.98e9 * new + 4 * 32 * 4096 * new * (cached + new / 2)) / 495e12
    assert prefill.one(new + cached, cached) == pytest.approx(expected)
