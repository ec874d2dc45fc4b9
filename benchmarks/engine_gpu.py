"""How fast the torch engine decodes and prefills on one GPU, beside the memory's limit and, if asked, vLLM.

    python -m benchmarks.engine_gpu [--json] [--batches 1 8 32 128 256] [--prompts 1024 4096 8192 15000]
        [--tensor-parallel 1] [--step-tokens 16384] [--vllm PYTHONPATH] [--model FOLDER] [--profile FILE]

The shape is Llama-3.1-8B's with random weights in bfloat16; prompts are random tokens, prefix caching can't
hit. Decode is what 256 further tokens of each sequence cost, all sequences together, after prompts of 128
tokens (the time of 257 output tokens less that of one); prefill the time to one token of one prompt. The
limit is the bytes of weights and KV that a step has to read over the bandwidth of a plain device copy, which
is measured here; with tensor parallelism each GPU reads its part. With ``--vllm`` vLLM does the same work
afterwards, in a process of its own with that PYTHONPATH, with CUDA graphs and its own defaults.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.interface import SequenceKey

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}
MAX_MODEL_LEN = 16384
DECODED = 256
FIGURES_MARK = "figures: "
PROMPT = 128
RunOnce = Callable[[list[list[int]], int], float]
"""Answers prompts with so many tokens each; returns seconds."""


def prompts_of(count: int, num_tokens: int) -> list[list[int]]:
    """Random tokens, never twice the same."""
    return [[random.randint(10, 100_000) for _ in range(num_tokens)] for _ in range(count)]


def measure(run: RunOnce, batches: list[int], prompts: list[int]) -> dict[str, float]:
    """Milliseconds a decode step, and of a prefill; the best of two and three."""
    run(prompts_of(4, PROMPT), 8)
    found: dict[str, float] = {}
    for batch in batches:
        one = min(run(prompts_of(batch, PROMPT), 1) for _ in range(2))
        many = min(run(prompts_of(batch, PROMPT), DECODED + 1) for _ in range(2))
        found[f"decode {batch}"] = (many - one) / DECODED * 1e3
    for num_tokens in prompts:
        found[f"prefill {num_tokens}"] = min(run(prompts_of(1, num_tokens), 1) for _ in range(3)) * 1e3
    return found


def kvrelay_runner(folder: Path, max_num_seqs: int, num_gpus: int, step_tokens: int) -> RunOnce:
    """The engine, stepped by this thread."""
    from kvrelay.engine.config import EngineConfig
    from kvrelay.engine.factory import load_engine

    engine = load_engine(
        EngineConfig(
            str(folder),
            dtype="bfloat16",
            device="cuda",
            random_weights=True,
            kv_bytes=32 << 30,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=step_tokens,
            tensor_parallel_size=num_gpus,
            max_waiting=1024,
        )
    )
    engine.prepare_thread()
    number = 0

    def run(prompts: list[list[int]], num_tokens: int) -> float:
        nonlocal number
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        began_s = time.perf_counter()
        for prompt in prompts:
            number += 1
            engine.submit(TokenRequest(tuple(prompt), len(prompt), sampling), SequenceKey(str(number)))
        left = len(prompts)
        while left:
            output = engine.step()
            if output.failures:
                sys.exit(f"the engine failed: {output.failures[0]}")
            left -= sum(item.finish_reason is not None for item in output.outputs)
        return time.perf_counter() - began_s

    return run


def vllm_runner(folder: Path, max_num_seqs: int, num_gpus: int, step_tokens: int) -> RunOnce:
    """vLLM's offline engine."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    vllm: Any = __import__("vllm")
    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        gpu_memory_utilization=0.85,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=False,
        max_num_batched_tokens=step_tokens,
        tensor_parallel_size=num_gpus,
        disable_log_stats=True,
    )

    def run(prompts: list[list[int]], num_tokens: int) -> float:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        began_s = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - began_s

    return run


def copy_bandwidth() -> float:
    """Bytes a second read by a device copy of 1 GiB, counting bytes read and written."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / best


def bytes_of_step(batch: int) -> float:
    """What a decode step must read: all weights but the embedding, and the KV at its mean length."""
    config: Any = LLAMA_3_1_8B
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * inner)
    weights += config["vocab_size"] * hidden
    kv = layers * 2 * kv_size * (PROMPT + DECODED / 2)
    return 2.0 * (weights + batch * kv)


def run_vllm(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine_gpu", "--only-vllm", "--json", "--model", str(folder)]
    command += ["--batches", *map(str, args.batches), "--prompts", *map(str, args.prompts)]
    command += [f"--tensor-parallel={args.tensor_parallel}", f"--step-tokens={args.step_tokens}"]
    path = os.pathsep.join([args.vllm, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"vLLM failed with {done.returncode}; its own words are above")
    for line in done.stdout.splitlines():  # vLLM prints there, too
        if line.startswith(FIGURES_MARK):
            found: dict[str, float] = json.loads(line.removeprefix(FIGURES_MARK))
            return found
    sys.exit("vLLM printed no figures; its own words are above")


def profile(run: RunOnce, batch: int, file: Path) -> None:
    """Where the device's time goes in decode, as a table."""
    from torch.profiler import ProfilerActivity, profile

    prompts = prompts_of(batch, PROMPT)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run(prompts, 40)
    with file.open("a") as out:
        print(f"batch {batch}", file=out)
        print(found.key_averages().table(sort_by="cuda_time_total", row_limit=25), file=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096, 8192, 15000])
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="GPUS")
    parser.add_argument("--step-tokens", type=int, default=MAX_MODEL_LEN, help="at most, in one step")
    parser.add_argument("--vllm", metavar="PYTHONPATH", help="also run vLLM, found there")
    parser.add_argument("--only-vllm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="a folder with another config.json")
    parser.add_argument("--profile", type=Path, help="write where the device's time goes to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.model or Path(name)
        if args.model is None:
            (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
        if args.only_vllm:
            llm = vllm_runner(folder, max(args.batches), args.tensor_parallel, args.step_tokens)
            found = measure(llm, args.batches, args.prompts)
            print(f"\n{FIGURES_MARK}{json.dumps(found)}", flush=True)
            return
        began_s = time.perf_counter()
        run = kvrelay_runner(folder, max(args.batches), args.tensor_parallel, args.step_tokens)
        startup_s = time.perf_counter() - began_s
        figures = {"kvrelay": measure(run, args.batches, args.prompts)}
        if args.profile:
            for batch in (args.batches[0], args.batches[-1]):
                profile(run, batch, args.profile)
        import torch

        name, version = torch.cuda.get_device_name(), torch.__version__
        bandwidth = copy_bandwidth()
        del run  # and with it the engine
        gc.collect()
        torch.cuda.empty_cache()
        print(json.dumps(figures["kvrelay"]), file=sys.stderr, flush=True)  # should vLLM fail
        if args.vllm:
            figures["vllm"] = run_vllm(args, folder)
    if args.json:
        print(json.dumps({"device": name, "torch": version, "copy_bytes_per_s": bandwidth, **figures}))
        return
    print(f"{name}, PyTorch {version}, device copy {bandwidth / 1e9:.0f} GB/s, start-up {startup_s:.1f} s")
    beside = f"{'vLLM ms':>10}{'ratio':>8}" if args.vllm else ""
    print(f"{'':16}{'ms':>9}{'tok/s':>9}{'of limit':>10}{beside}")
    for what, ms in figures["kvrelay"].items():
        kind, count = what.split()
        line = f"{what:16}{ms:>9.2f}{int(count) / ms * 1e3:>9.0f}"
        limit_ms = bytes_of_step(int(count)) / bandwidth * 1e3 / args.tensor_parallel
        line += f"{limit_ms / ms:>10.0%}" if kind == "decode" and args.model is None else f"{'':10}"
        if args.vllm:
            line += f"{figures['vllm'][what]:>10.2f}{figures['vllm'][what] / ms:>8.2f}"
        print(line)


if __name__ == "__main__":
    main()
