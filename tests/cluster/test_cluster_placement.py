"""Placement by held prefixes on real processes: it uses caches, knows what they hold beforehand, says why."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.explanation import Explanation
from kvrelay.core.node_messages import Role
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster

NUM_GROUPS, PREFIX_TOKENS, SUFFIX_TOKENS = 10, 256, 20
SIM = ["--model=sim", "--num-blocks=160", "--max-num-seqs=16", "--sim-prefill-token-s=1e-4"]
"""160 blocks of 16 tokens: half of the prefixes on each node, with room for suffixes; not all of them."""
Prompt = tuple[int, ...]


def shared_prefix_prompts(num: int) -> list[Prompt]:
    rng = random.Random(5)

    def tokens(count: int) -> Prompt:
        return tuple(rng.randrange(1, 30_000) for _ in range(count))

    prefixes = [tokens(PREFIX_TOKENS) for _ in range(NUM_GROUPS)]
    order = [number % NUM_GROUPS for number in range(num)]
    rng.shuffle(order)
    return [prefixes[group] + tokens(SUFFIX_TOKENS) for group in order]


async def ask_all(cluster: Any, prompts: Sequence[Prompt], concurrency: int) -> list[Explanation]:
    """Each prompt once, so many at a time; what the router says of each afterwards."""
    waiting = iter(enumerate(prompts))
    explained: list[Explanation] = []
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    async with cluster.client() as client:

        async def keep_asking() -> None:
            for number, prompt in waiting:
                stream = client.generate(prompt, sampling=sampling, request_id=f"r{number}")
                await stream.each(lambda chunk: None)
                explained.append(await client.explain(f"r{number}"))

        await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    return explained


def start(starter: Any, placement: str) -> Any:
    router_args = ["--placement", placement, "--num-remembered-decisions", "1000"]
    return starter.start(2, 2, SIM, router_args=router_args)


def hit_rate(explained: Sequence[Explanation]) -> float:
    """By the prefill nodes' own reports."""
    return share(explained, [one.measured.num_cached_tokens or 0 for one in explained])


def expected_hit_rate(explained: Sequence[Explanation]) -> float:
    """By the index, at the moment of each placement."""
    return share(explained, [chosen_terms(one, Role.PREFILL)["cached_tokens"] for one in explained])


def share(explained: Sequence[Explanation], tokens: Sequence[float]) -> float:
    return sum(tokens) / sum(one.measured.num_prompt_tokens for one in explained)


def chosen_terms(explanation: Explanation, role: Role) -> dict[str, float]:
    decision = explanation.decision
    chosen = decision.prefill_node if role is Role.PREFILL else decision.decode_node
    return dict(next(one.terms for one in decision.candidates if one.node_id == chosen))


def is_settled(state: ClusterState) -> bool:
    return not any(node.index_stale for node in state.nodes) and not any(state.num_requests.values())


async def run_explain(cluster: Any, *options: str) -> str:
    command = ["-m", "kvrelay.cli", "explain", "r5", "--router", cluster.address, *options]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_caches_are_used_as_one_and_the_index_knows_what_they_hold(starter: Any) -> None:
    prompts = shared_prefix_prompts(120)
    aware, unaware = start(starter, "kvrelay"), start(starter, "round-robin")
    with_index, by_turns = await ask_all(aware, prompts, 3), await ask_all(unaware, prompts, 3)
    assert abs(hit_rate(with_index) - expected_hit_rate(with_index)) < 0.02
    assert hit_rate(with_index) > hit_rate(by_turns) + 0.1


async def test_a_later_turn_goes_back_to_its_decode_node_and_only_what_is_new_is_sent(starter: Any) -> None:
    cluster = starter.start(2, 3, SIM)
    async with cluster.client() as client:
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        for session in range(4):
            prompt = tuple(1000 * session + place + 1 for place in range(100))
            answer = await client.complete(prompt, sampling=sampling, request_id=f"first{session}")
            first = await client.explain(f"first{session}")
            await cluster.wait_for_state("nothing runs and the index is in step", is_settled)
            again = prompt + answer.token_ids + (7, 8, 9)
            await client.complete(again, sampling=sampling, request_id=f"second{session}")
            second = await client.explain(f"second{session}")
            assert second.decision.decode_node == first.decision.decode_node
            held = second.measured.num_held_tokens
            assert held is not None
            assert held >= len(prompt + answer.token_ids) // 16 * 16 - 16, "generated blocks count"
            assert chosen_terms(second, Role.DECODE)["held_tokens"] == held
            assert second.measured.kv_bytes < first.measured.kv_bytes


async def test_explain_shows_all_candidates_with_their_terms(starter: Any) -> None:
    cluster = starter.start(2, 2, SIM)
    await ask_all(cluster, shared_prefix_prompts(6), 1)
    text = await run_explain(cluster)
    assert "by kvrelay" in text
    for word in ("queue_s", "prefill_s", "others_s", "handoff_s", "decode_s", "TTFT from this placement"):
        assert word in text
    shown = json.loads(await run_explain(cluster, "--json"))
    candidates = {one["node_id"]: one for one in shown["decision"]["candidates"]}
    assert set(candidates) == {"p0", "p1", "d0", "d1"}
    terms = candidates["p0"]["terms"]
    parts = ("queue_s", "pull_s", "prefill_s", "others_s", "overhead_s")
    assert candidates["p0"]["score"] == pytest.approx(sum(terms[name] for name in parts))
    assert shown["decision"]["predicted_ttft_s"] > 0
    measured = shown["measured"]
    assert measured["placed_ttft_s"] > 0
    assert measured["handoff_s"] >= 0
    assert measured["itl_s"] > 0
