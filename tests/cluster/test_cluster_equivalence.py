"""The cluster answers as the model does: as `transformers` and as the engine alone, token for token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.embedded_model import ensure_smollm2

pytestmark = [pytest.mark.cluster, pytest.mark.model]
NUM_TOKENS = 12
NUM_BLOCKS = 1024
INTERPRETER_AND_BUFFERS_BYTES = 400e6  # A tenth of it is LLVM, which compiles kernels.

TEXTS = [
    "The",
    "Hello",
    "Once upon a time there was a fox who",
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "1, 2, 3, 4,",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, age FROM users WHERE",
    "In 1969, the first humans",
    "Le chat est sur la",
    "Die Hauptstadt von Deutschland ist",
    "今日は",
    "Привет, как",
    "🙂🙂🙂",
    "A list of colours:\n- red\n- green\n-",
    "Q: What is 2 + 2?\nA:",
    '{"name": "Ada", "born":',
    "<html><head><title>",
    "To be, or not to be, that is",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Water boils at one hundred degrees. " * 20,
]
SHARED = "You are a careful assistant who answers in one short sentence and never guesses. " * 8
QUESTIONS = [
    "What is ice?",
    "Who wrote Hamlet?",
    "Name a prime number.",
    "What is a router?",
    "Is the sun a star?",
]
LONG_WORDS = [300, 700, 1100, 1500]


def _prompts(tokenizer) -> list[tuple[int, ...]]:
    """At least 30 prompts of 1 to 2,000 tokens, several sharing a long prefix."""
    texts = TEXTS + [SHARED + question for question in QUESTIONS]
    texts += [" ".join(f"item {i} costs {i * 7 % 100} coins," for i in range(n // 9)) for n in LONG_WORDS]
    prompts = [tuple(tokenizer.encode(text)) for text in texts]
    prompts.append(tuple(tokenizer.encode("The old library held many books. " * 400))[:2000])
    assert len(prompts) >= 30
    assert min(map(len, prompts)) == 1
    assert max(map(len, prompts)) == 2000
    return prompts


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return ensure_smollm2()


@pytest.fixture(scope="module")
def cluster(module_starter, smollm2: Path):
    return module_starter.start(
        1, 1, ["--model", str(smollm2), "--dtype", "float32", "--num-blocks", str(NUM_BLOCKS)]
    )


async def _ask_all(cluster, requests: list[TokenRequest], at_once: int) -> list[tuple[int, ...]]:
    gate = asyncio.Semaphore(at_once)
    async with cluster.client() as client:

        async def ask(request: TokenRequest) -> tuple[int, ...]:
            async with gate:
                return (await client.complete(request.token_ids, sampling=request.sampling)).token_ids

        return list(await asyncio.gather(*(ask(request) for request in requests)))


@pytest.mark.timeout(900)  # 31 prompts through transformers, while CI's other half computes too
async def test_greedy_output_equals_transformers_and_the_engine_alone(
    cluster, run_alone, smollm2: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = _prompts(AutoTokenizer.from_pretrained(smollm2))
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    requests = [TokenRequest(prompt, len(prompt), sampling) for prompt in prompts]
    answers = await _ask_all(cluster, requests, at_once=8)
    assert run_alone(smollm2, requests) == answers
    # That the engine alone equals transformers for prompts like all of these, the engine's own tests show.
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, answer in list(zip(prompts, answers, strict=True))[::3]:
        ids = torch.tensor([prompt])
        reference = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            eos_token_id=None,
        )[0, len(prompt) :]
        assert answer == tuple(reference.tolist()), f"prompt of {len(prompt)} tokens: {prompt[:12]}"
    await cluster.wait_idle()


async def test_sampled_output_with_a_seed_is_the_same_alone_in_a_batch_and_through_the_cluster(
    cluster, run_alone, smollm2: Path
) -> None:
    from transformers import AutoTokenizer

    prompts = _prompts(AutoTokenizer.from_pretrained(smollm2))[:10]
    requests = [
        TokenRequest(
            prompt,
            len(prompt),
            SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=1000 + i, ignore_eos=True),
        )
        for i, prompt in enumerate(prompts)
    ]
    one_by_one = [run_alone(smollm2, [request])[0] for request in requests[:3]]
    batch = run_alone(smollm2, requests)
    through_cluster = await _ask_all(cluster, requests, at_once=10)
    assert batch[:3] == one_by_one
    assert through_cluster == batch
    assert len(set(batch)) == len(batch)
    await cluster.wait_idle()


def _own_bytes(pid: int) -> int:
    """Memory of the process alone: mapped libraries and files are not counted."""
    rows = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = {row[0]: int(row[1]) for row in rows if row and row[0] in ("RssAnon:", "RssShmem:")}
    return sum(kib.values()) * 1024


async def test_a_node_holds_one_copy_of_the_weights_and_its_kv_budget(cluster, smollm2: Path) -> None:
    weights_bytes = (smollm2 / "model.safetensors").stat().st_size
    kv_bytes = NUM_BLOCKS * 16 * 30 * 2 * 3 * 64 * 4
    prompts = [tuple(range(start, start + 900)) for start in range(100, 1000, 100)]
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    await _ask_all(cluster, [TokenRequest(prompt, len(prompt), sampling) for prompt in prompts], at_once=8)
    for node in cluster.nodes.values():
        assert _own_bytes(node.popen.pid) < weights_bytes + kv_bytes + INTERPRETER_AND_BUFFERS_BYTES
    assert _own_bytes(cluster.router.popen.pid) < 150e6
    await cluster.wait_idle()
