"""Our torch engine beside transformers' generate(): same model, prompts, dtype and threads, in one run.

    python benchmarks/engine_vs_transformers.py [--model FOLDER] [--dtype bfloat16] [--json]

Greedy, a fixed number of output tokens, prompts of equal length (which spares transformers its padding).
Prefill is the time to the first token of the whole batch; decode what the remaining tokens take on top.
The two sides take turns, and each figure is the best of `--rounds`: on a busy machine the best round is
the one least disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.engine.factory import load_engine
from kvrelay.engine.interface import Engine, SequenceKey

CASES = ((1, 128, 48), (1, 1024, 32), (8, 128, 48), (16, 128, 48), (32, 128, 48))
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


class EngineSide:
    """Ours. A new engine run never finds a prompt in the prefix cache: each call salts it anew."""

    name = "kvrelay"

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        self._engine: Engine = load_engine(
            EngineConfig(model=str(path), dtype=dtype, num_threads=threads, kv_bytes=768 << 20)
        )
        self._num_calls = 0

    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        self._num_calls += 1
        salt = str(self._num_calls).encode()
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            request = TokenRequest(tuple(prompt), len(prompt), sampling, salt)
            self._engine.submit(request, SequenceKey(str(index)))
        results: list[list[int]] = [[] for _ in prompts]
        while self._engine.has_work():
            for output in self._engine.step().outputs:
                results[int(output.key)].append(output.token_id)
        return results


class TransformersSide:
    """transformers' usual way: left-padded batch, attention mask, sdpa, KV cache, inference mode."""

    name = "transformers"

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with self._torch.inference_mode():
            ids = self._model.generate(
                self._torch.tensor(padded),
                attention_mask=self._torch.tensor(mask),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return [row[longest:].tolist() for row in ids]


Side = EngineSide | TransformersSide


def measure(sides: list[Side], batch: int, prompt_tokens: int, output_tokens: int, rounds: int) -> list[Row]:
    """Time one case on all sides, taking turns."""
    prompts = [
        [5 + (index * 7919 + position * 104729) % 40000 for position in range(prompt_tokens)]
        for index in range(batch)
    ]
    first_s: dict[str, float] = {}
    whole_s: dict[str, float] = {}
    for _ in range(rounds):
        for side in sides:
            for num_tokens, best in ((1, first_s), (output_tokens, whole_s)):
                spent_s = seconds(lambda side=side, num_tokens=num_tokens: side.generate(prompts, num_tokens))
                best[side.name] = min(best.get(side.name, spent_s), spent_s)
    return [
        Row(
            side.name,
            batch,
            prompt_tokens,
            output_tokens,
            batch * prompt_tokens / first_s[side.name],
            batch * (output_tokens - 1) / max(1e-9, whole_s[side.name] - first_s[side.name]),
        )
        for side in sides
    ]


def seconds(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def print_table(rows: list[Row]) -> None:
    print(f"{'batch':>5} {'prompt':>6} | {'prefill tok/s':^29} | {'decode tok/s':^29}")
    print(
        f"{'':5} {'':6} | {'kvrelay':>9} {'transf.':>9} {'ratio':>9} | {'kvrelay':>9} {'transf.':>9} {'ratio':>9}"
    )
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
        side.generate([[5, 6, 7]], 4)
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


if __name__ == "__main__":
    main()
