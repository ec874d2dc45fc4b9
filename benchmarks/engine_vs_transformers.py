"""Our torch engine beside transformers' generate(): same model, prompts, dtype and threads, in one run.

    python benchmarks/engine_vs_transformers.py [--model FOLDER] [--dtype bfloat16] [--json]

Greedy, a fixed number of output tokens, prompts of equal length (which spares transformers its padding).
Prefill is the time until the whole batch has its first token, the best of `--rounds`; decode comes from the
lower quartile of all the steps' durations. The two sides take turns. On a busy machine these are the
figures least disturbed, for both sides alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.engine.factory import load_engine
from kvrelay.engine.interface import Engine, SequenceKey

CASES = ((1, 128, 32), (1, 1024, 24), (8, 128, 32), (16, 128, 32), (32, 128, 32))
"""(batch, prompt tokens, output tokens)"""

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Row:
    side: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    prefill_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True, slots=True)
class Timing:
    first_s: float
    steps_s: list[float]


class EngineSide:
    """Ours. A new engine run never finds a prompt in the prefix cache: each call salts it anew."""

    name = "kvrelay"

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        self._engine: Engine = load_engine(
            EngineConfig(model=str(path), dtype=dtype, num_threads=threads, kv_bytes=768 << 20)
        )
        self._num_calls = 0

    def time(self, prompts: Prompts, num_tokens: int) -> Timing:
        self._num_calls += 1
        salt = str(self._num_calls).encode()
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        start_s = last_s = time.perf_counter()
        for index, prompt in enumerate(prompts):
            request = TokenRequest(tuple(prompt), len(prompt), sampling, salt)
            self._engine.submit(request, SequenceKey(str(index)))
        started: set[str] = set()
        first_s, steps_s = math.inf, []
        while self._engine.has_work():
            result = self._engine.step()
            now_s = time.perf_counter()
            if result.num_decode_tokens == len(prompts):  # Only steps that decode the whole batch count.
                steps_s.append(now_s - last_s)
            started |= {output.key for output in result.outputs}
            if len(started) == len(prompts):
                first_s = min(first_s, now_s - start_s)
            last_s = now_s
        return Timing(first_s, steps_s)


class TransformersSide:
    """transformers' usual way: left-padded batch, attention mask, sdpa, KV cache, inference mode."""

    name = "transformers"

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._model.train(False)

    def time(self, prompts: Prompts, num_tokens: int) -> Timing:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with self._torch.inference_mode():
            stopwatch = _Stopwatch()
            start_s = time.perf_counter()
            self._model.generate(
                self._torch.tensor(padded),
                attention_mask=self._torch.tensor(mask),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                streamer=stopwatch,
            )
        times_s = stopwatch.times_s[1:]  # The first one is the prompt.
        return Timing(times_s[0] - start_s, [after - before for before, after in pairwise(times_s)])


class _Stopwatch:
    """What generate() takes for a streamer: notes when each step's tokens come."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


Side = EngineSide | TransformersSide


def measure(sides: list[Side], batch: int, prompt_tokens: int, output_tokens: int, rounds: int) -> list[Row]:
    """Time one case on all sides, taking turns."""
    prompts = [
        [5 + (index * 7919 + position * 104729) % 40000 for position in range(prompt_tokens)]
        for index in range(batch)
    ]
    first_s: dict[str, float] = {}
    steps_s: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            timing = side.time(prompts, output_tokens)
            first_s[side.name] = min(first_s.get(side.name, math.inf), timing.first_s)
            steps_s[side.name] += timing.steps_s
    return [
        Row(
            side.name,
            batch,
            prompt_tokens,
            output_tokens,
            batch * prompt_tokens / first_s[side.name],
            batch / statistics.quantiles(steps_s[side.name], n=4)[0],
        )
        for side in sides
    ]


def matrix_flops_per_s(dtype: str, threads: int) -> float:
    """The best rate of a product of 128 rows with packed weights: what arithmetic allows."""
    import torch

    from kvrelay.engine.linear import PackedLinear

    torch.set_num_threads(threads)
    out_features, in_features, num_rows = 16_384, 576, 128
    linear = PackedLinear(torch.randn(out_features, in_features).to(getattr(torch, dtype)))
    rows = torch.randn(num_rows, in_features).to(getattr(torch, dtype))
    best_s = math.inf
    for _ in range(20):
        began_s = time.perf_counter()
        linear(rows)
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2.0 * out_features * in_features * num_rows / best_s


def num_parameters(path: Path) -> int:
    """Of all the weights that a token is multiplied with, the output layer's included."""
    from kvrelay.engine.model.config import read_model_config

    config = read_model_config(path)
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def print_limit(path: Path, dtype: str, threads: int, rows: list[Row]) -> None:
    """What the matrix products alone would allow the largest batch."""
    batch = max(row.batch for row in rows)
    rate = matrix_flops_per_s(dtype, threads)
    limit_tok_s = rate / (2 * num_parameters(path))
    print(f"matrix products, {rate / 1e9:.0f} GFLOP/s, allow {limit_tok_s:.0f} tok/s at batch {batch}")


def print_table(rows: list[Row]) -> None:
    print(f"{'batch':>5} {'prompt':>6} | {'prefill tok/s':^29} | {'decode tok/s':^29}")
    names = f"{'kvrelay':>9} {'transf.':>9} {'ratio':>9}"
    print(f"{'':5} {'':6} | {names} | {names}")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        cells = [
            f"{mine:9.1f} {other:9.1f} {mine / other:8.2f}x"
            for mine, other in (
                (ours.prefill_tok_s, theirs.prefill_tok_s),
                (ours.decode_tok_s, theirs.decode_tok_s),
            )
        ]
        print(f"{ours.batch:5d} {ours.prompt_tokens:6d} | {' | '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", help="only these batch sizes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    path = args.model or ensure_smollm2()
    sides: list[Side] = [
        EngineSide(path, args.dtype, args.threads),
        TransformersSide(path, args.dtype, args.threads),
    ]
    for side in sides:
        side.time([[5, 6, 7]], 4)
    rows: list[Row] = []
    for batch, prompt_tokens, output_tokens in CASES:
        if not args.batches or batch in args.batches:
            rows += measure(sides, batch, prompt_tokens, output_tokens, args.rounds)
    if args.json:
        settings = {"model": path.name, "dtype": args.dtype, "threads": args.threads, "rounds": args.rounds}
        print(json.dumps({**settings, "rows": [asdict(row) for row in rows]}))
    else:
        print(f"{path.name}, {args.dtype}, {args.threads} threads, best of {args.rounds}")
        print_table(rows)
        print_limit(path, args.dtype, args.threads, rows)


if __name__ == "__main__":
    main()
