"""What prefill beside decode costs the decodes: chunks of fixed sizes, and chunks sized to an ITL promise.

    python -m benchmarks.chunk_sizing [--json] [--device cuda] [--model FOLDER] [--streams 8] [--seconds 30]
        [--prompt-tokens 1500] [--budgets 256 512 2048 8192] [--promises-ms 100 200 400]

The torch engine, stepped by this thread, one engine after the other for each setting. Streams decode all the
time; beside them two prompts of random tokens always run or wait. On the CPU the model is the embedded
SmolLM2; on a GPU it is Llama-3.1-8B's shape, or that of ``--model``, with random weights in bfloat16.

ITL is the time between two tokens of a stream, here that between two steps. *Within* is the share of the
steps that both decode and prefill which took no longer than that promise, whatever the setting. The first
part of each run, `--warmup-seconds`, is not counted: kernels are compiled and step times learnt in it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.engine_gpu import LLAMA_3_1_8B
from benchmarks.percentiles import percentile
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.factory import load_engine
from kvrelay.engine.interface import Engine, SequenceKey, StepOutput

STREAM_PROMPT_TOKENS = 128
NUM_PROMPTS_OPEN = 2
FEWEST_STEPS = 5
DEFAULTS = {
    "cpu": {"prompt_tokens": 1500, "promises_ms": [100.0, 200.0, 400.0], "max_model_len": 8192},
    "cuda": {"prompt_tokens": 8192, "promises_ms": [15.0, 25.0, 50.0], "max_model_len": 32_768},
}


@dataclass(frozen=True, slots=True)
class Row:
    setting: str
    num_steps: int
    itl_p50_ms: float
    itl_p99_ms: float
    prefill_tok_s: float
    within: dict[str, float]
    """Share of steps by promise in ms."""


@dataclass(slots=True)
class Run:
    """Durations of the mixed steps, and how much they prefilled in all the time."""

    steps_s: list[float] = field(default_factory=list)
    num_prefill_tokens: int = 0
    elapsed_s: float = 0.0

    def row(self, setting: str, promises_ms: list[float]) -> Row:
        return Row(
            setting,
            len(self.steps_s),
            percentile(self.steps_s, 50) * 1e3,
            percentile(self.steps_s, 99) * 1e3,
            self.num_prefill_tokens / self.elapsed_s,
            {
                f"{promise_ms:g}": sum(step_s <= promise_ms / 1e3 for step_s in self.steps_s)
                / len(self.steps_s)
                for promise_ms in promises_ms
            },
        )


class Traffic:
    """Streams that decode without end, and prompts of which two are always in the engine."""

    def __init__(self, engine: Engine, num_streams: int, prompt_tokens: int) -> None:
        self._engine = engine
        self._prompt_tokens = prompt_tokens
        self._numbers = itertools.count()
        self._num_open = 0
        for _ in range(num_streams):
            self._submit(STREAM_PROMPT_TOKENS, engine.info.max_model_len)
        num_started = 0
        while num_started < num_streams:
            num_started = len(self._checked_step().outputs)

    def step(self) -> StepOutput:
        while self._num_open < NUM_PROMPTS_OPEN:
            self._submit(self._prompt_tokens, 1)
            self._num_open += 1
        output = self._checked_step()
        self._num_open -= sum(item.finish_reason is not None for item in output.outputs)
        return output

    def _submit(self, num_tokens: int, max_tokens: int) -> None:
        highest = min(100_000, self._engine.info.vocab_size - 1)
        ids = tuple(random.randint(10, highest) for _ in range(num_tokens))
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._engine.submit(TokenRequest(ids, num_tokens, sampling), SequenceKey(str(next(self._numbers))))

    def _checked_step(self) -> StepOutput:
        output = self._engine.step()
        if output.failures:
            sys.exit(f"the engine failed: {output.failures[0]}")
        return output


def measure(engine: Engine, args: argparse.Namespace) -> Run:
    """Steps of `args.seconds`, after those of `args.warmup_seconds`."""
    traffic = Traffic(engine, args.streams, args.prompt_tokens)
    warm_s = time.perf_counter() + args.warmup_seconds
    while time.perf_counter() < warm_s:
        traffic.step()
    run = Run()
    began_s = last_s = time.perf_counter()
    while run.elapsed_s < args.seconds or len(run.steps_s) < FEWEST_STEPS:
        output = traffic.step()
        now_s = time.perf_counter()
        if output.num_prefill_tokens and output.num_decode_tokens:
            run.steps_s.append(now_s - last_s)
        run.num_prefill_tokens += output.num_prefill_tokens
        last_s, run.elapsed_s = now_s, now_s - began_s
    return run


def engine_of(folder: Path, args: argparse.Namespace, budget: int, promise_ms: float | None) -> Engine:
    on_gpu = args.device != "cpu"
    return load_engine(
        EngineConfig(
            str(folder),
            dtype="bfloat16" if on_gpu else "float32",
            device=args.device,
            random_weights=on_gpu,
            kv_bytes=24 << 30 if on_gpu else 1 << 30,
            max_model_len=args.max_model_len,
            max_num_seqs=args.streams + NUM_PROMPTS_OPEN,
            max_num_batched_tokens=budget,
            itl_promise_ms=promise_ms,
            num_threads=args.threads,
        )
    )


def free_memory(device: str) -> None:
    """What the engine before has held."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


def print_row(row: Row) -> None:
    cells = "".join(f"{share:>12.1%}" for share in row.within.values())
    print(
        f"{row.setting:16}{row.num_steps:>7}{row.itl_p50_ms:>10.1f}{row.itl_p99_ms:>10.1f}"
        f"{row.prefill_tok_s:>12.0f}{cells}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; on a GPU its config.json suffices")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--warmup-seconds", type=float, default=10.0)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budgets", type=int, nargs="*", default=[256, 512, 2048, 8192])
    parser.add_argument("--promises-ms", type=float, nargs="*")
    args = parser.parse_args()
    for name, value in DEFAULTS["cpu" if args.device == "cpu" else "cuda"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def model_folder(args: argparse.Namespace, scratch: Path) -> Path:
    if args.model is not None:
        return Path(args.model)
    if args.device == "cpu":
        from kvrelay.engine.embedded_model import ensure_smollm2

        return ensure_smollm2()
    (scratch / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    return scratch


def main() -> None:
    args = parse_arguments()
    largest = max(args.budgets, default=8192)
    settings: list[tuple[str, int, float | None]] = [
        *((f"budget {budget}", budget, None) for budget in args.budgets),
        *((f"promise {promise_ms:g} ms", largest, promise_ms) for promise_ms in args.promises_ms),
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(args, Path(name))
        if not args.json:
            print(f"{args.streams} streams on {args.device}, prompts of {args.prompt_tokens} tokens")
            within = "".join(f"{f'<= {promise_ms:g} ms':>12}" for promise_ms in args.promises_ms)
            print(f"{'':16}{'steps':>7}{'ITL p50':>10}{'p99 ms':>10}{'prefill/s':>12}{within}")
        for setting, budget, promise_ms in settings:
            rows.append(
                measure(engine_of(folder, args, budget, promise_ms), args).row(setting, args.promises_ms)
            )
            free_memory(args.device)
            if not args.json:
                print_row(rows[-1])
    if args.json:
        print(json.dumps({"device": args.device, "streams": args.streams, "rows": list(map(asdict, rows))}))


if __name__ == "__main__":
    main()
