"""What a queue of prompts costs a prefill node's engine, with the next step launched ahead and without.

    python -m benchmarks.prefill_queue_gpu [--json] [--prompts 1024 4096] [--count 16] [--rounds 5]
        [--load 0.85] [--device cuda] [--model FOLDER]

The engine's steps take one prompt of random tokens each, and prefill it as for a handoff: layer by layer is
reported, to a listener that does nothing. *alone* is the time from a lone prompt's arrival to its token;
*queue* that of `--count` prompts which arrive at once, to the last one's token, over their number. By what
queue is longer without launching ahead, the device waits for the host between two steps. *ttft* are the
times from arrival to token of as many prompts that arrive by chance, on average `--load` times as many as a
queue lets through without launching ahead; both ways get the same arrivals.

With and without in turn, one engine for each length; medians of `--rounds`, after one that is not counted.
On a GPU the model is Llama-3.1-8B's shape, or that of ``--model``, with random weights in bfloat16. On the
CPU, where no step is launched ahead, it is for trying out this script, and needs ``--model``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.engine_gpu import LLAMA_3_1_8B
from benchmarks.percentiles import percentile
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.torch_engine import TorchEngine

BLOCK_TOKENS = 16
SPARE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Way:
    """With or without launching ahead."""

    queue_ms: float
    ttft_p50_ms: float
    ttft_p90_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One length of prompts."""

    num_tokens: int
    alone_ms: float
    waits: Way
    ahead: Way


def build_engine(folder: Path, device: str, num_tokens: int, count: int) -> TorchEngine:
    """With room for `count` prompts of `num_tokens`, one a step."""
    engine = TorchEngine(
        EngineConfig(
            str(folder),
            dtype="float32" if device == "cpu" else "bfloat16",
            device=device,
            random_weights=True,
            block_size=BLOCK_TOKENS,
            num_blocks=count * (num_tokens // BLOCK_TOKENS + 2),
            max_model_len=num_tokens + SPARE_TOKENS,
            max_num_seqs=min(64, num_tokens),
            max_num_batched_tokens=num_tokens,
        )
    )
    engine.prepare_thread()
    engine.set_kv_ready_listener(lambda ready: None)
    return engine


def prefill(engine: TorchEngine, num_tokens: int, arrivals_s: Sequence[float]) -> list[float]:
    """Submit a prompt at each of these times from now on; seconds from now on to each one's token."""
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    prompts = [random.choices(range(engine.info.vocab_size), k=num_tokens) for _ in arrivals_s]
    requests = [TokenRequest(tuple(prompt), num_tokens, sampling) for prompt in prompts]
    began_s = time.perf_counter()
    num_submitted = 0
    tokens_s: list[float] = []
    while len(tokens_s) < len(requests):
        now_s = time.perf_counter() - began_s
        while num_submitted < len(requests) and arrivals_s[num_submitted] <= now_s:
            engine.submit_prefill(requests[num_submitted], SequenceKey(str(num_submitted)))
            num_submitted += 1
        if not engine.has_work():
            continue
        output = engine.step()
        if output.failures:
            sys.exit(f"the engine failed: {output.failures[0]}")
        tokens_s += [time.perf_counter() - began_s] * len(output.outputs)
        for item in output.outputs:
            engine.release(item.key)
    return tokens_s


def measure_once(
    engine: TorchEngine, num_tokens: int, count: int, load: float, rng_seed: int
) -> dict[bool, Way]:
    """Each way once; which is first, changes from time to time."""
    queues_s: dict[bool, float] = {}
    order = (False, True) if rng_seed % 2 else (True, False)
    for engine.runs_ahead in order:
        queues_s[engine.runs_ahead] = prefill(engine, num_tokens, [0.0] * count)[-1] / count
    chance = random.Random(rng_seed)
    gaps_s = [chance.expovariate(load / queues_s[False]) for _ in range(count)]
    arrivals_s = list(itertools.accumulate(gaps_s))
    found: dict[bool, Way] = {}
    for engine.runs_ahead in order:
        tokens_s = prefill(engine, num_tokens, arrivals_s)
        ttfts_s = [token_s - arrival_s for token_s, arrival_s in zip(tokens_s, arrivals_s, strict=True)]
        found[engine.runs_ahead] = Way(
            queues_s[engine.runs_ahead] * 1e3, median(ttfts_s) * 1e3, percentile(ttfts_s, 90) * 1e3
        )
    return found


def measure(engine: TorchEngine, num_tokens: int, count: int, rounds: int, load: float) -> Row:
    alone_ms: list[float] = []
    ways: dict[bool, list[Way]] = {False: [], True: []}
    for number in range(rounds + 1):
        found_ms = min(prefill(engine, num_tokens, [0.0])[0] for _ in range(3)) * 1e3
        found = measure_once(engine, num_tokens, count, load, number)
        if number:  # the first round compiles
            alone_ms.append(found_ms)
            for runs_ahead, way in found.items():
                ways[runs_ahead].append(way)
    return Row(num_tokens, median(alone_ms), median_of(ways[False]), median_of(ways[True]))


def median_of(ways: Sequence[Way]) -> Way:
    return Way(
        median(way.queue_ms for way in ways),
        median(way.ttft_p50_ms for way in ways),
        median(way.ttft_p90_ms for way in ways),
    )


def print_rows(rows: Sequence[Row]) -> None:
    print(f"{'tokens':>7}{'alone':>10}{'':>8}{'queue':>10}{'of alone':>10}{'ttft p50':>10}{'p90':>10}")
    for row in rows:
        print(f"{row.num_tokens:>7}{row.alone_ms:>10.2f}")
        for name, way in (("waits", row.waits), ("ahead", row.ahead)):
            share = way.queue_ms / row.alone_ms
            print(
                f"{'':17}{name:>8}{way.queue_ms:>10.2f}{share:>10.3f}{way.ttft_p50_ms:>10.2f}"
                f"{way.ttft_p90_ms:>10.2f}"
            )
        gap_ms = row.waits.queue_ms - row.ahead.queue_ms
        print(f"{'':17}without a step ahead {gap_ms:.2f} ms more, {gap_ms / row.ahead.queue_ms:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096], metavar="TOKENS")
    parser.add_argument("--count", type=int, default=16, help="prompts in a queue")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.85, help="of what a queue lets through")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, help="a folder with another config.json")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = args.model or Path(name)
        if args.model is None:
            (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
        for num_tokens in args.prompts:
            engine = build_engine(folder, args.device, num_tokens, args.count)
            rows.append(measure(engine, num_tokens, args.count, args.rounds, args.load))
            del engine
            gc.collect()
    import torch

    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    if args.json:
        figures = [asdict(row) for row in rows]
        print(json.dumps({"device": device, "torch": torch.__version__, "rows": figures}))
        return
    print(f"{device}, PyTorch {torch.__version__}; {args.count} prompts; milliseconds")
    print_rows(rows)


if __name__ == "__main__":
    main()
