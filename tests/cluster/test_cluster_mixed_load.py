"""Clusters of several shapes serve 200 mixed requests at once, give each its own answer, and leak nothing."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster
NUM_REQUESTS = 200


def _mixed_requests(seed: int) -> list[TokenRequest]:
    """Prompts of 1 to 220 tokens, a third of them sharing one of three prefixes; greedy and sampled."""
    rng = random.Random(seed)
    prefixes = [tuple(rng.randrange(256) for _ in range(96)) for _ in range(3)]
    requests = []
    for _ in range(NUM_REQUESTS):
        prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, 120)))
        if rng.random() < 1 / 3:
            prompt = rng.choice(prefixes) + prompt
        sampling = SamplingParams(max_tokens=rng.randint(1, 20), ignore_eos=True)
        if rng.random() < 0.5:
            sampling = SamplingParams(
                max_tokens=rng.randint(1, 20),
                temperature=rng.choice([0.5, 1.0]),
                top_k=rng.choice([0, 20]),
                top_p=rng.choice([1.0, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                seed=rng.randrange(2**40),
                ignore_eos=True,
            )
        requests.append(TokenRequest(prompt, len(prompt), sampling))
    return requests


async def _answer(client: AsyncClient, request: TokenRequest) -> tuple[int, ...]:
    result = await client.complete(request.token_ids, sampling=request.sampling)
    return result.token_ids


@pytest.mark.parametrize(
    ("num_prefill", "num_decode", "transport"), [(1, 1, "ucx"), (1, 1, "tcp"), (2, 2, "ucx"), (1, 3, "ucx")]
)
async def test_200_mixed_requests_at_once_are_answered_as_by_one_engine(
    starter, run_alone, tiny_llama: Path, num_prefill: int, num_decode: int, transport: str
) -> None:
    requests = _mixed_requests(seed=num_prefill * 10 + num_decode)
    expected = run_alone(tiny_llama, requests)
    cluster = starter.start(
        num_prefill, num_decode, ["--model", str(tiny_llama), "--num-blocks", "512", "--transport", transport]
    )
    async with cluster.client() as client:
        answers = await asyncio.gather(*(_answer(client, request) for request in requests))
    assert list(answers) == expected
    state = await cluster.wait_idle()
    assert {node.role for node in state.nodes} == {"prefill", "decode"}
    served = state.counters
    assert (served["requests"], served["failures"]) == (NUM_REQUESTS, 0)
    assert served["tokens"] == sum(len(tokens) for tokens in expected)
