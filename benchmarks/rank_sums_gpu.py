"""What a sum over the ranks of a tensor-parallel engine takes: torch's symmetric memory beside NCCL.

    python -m benchmarks.rank_sums_gpu [--ranks 2] [--columns 4096] [--rows 1 8 32 128 256 1024 4096 8192]

bfloat16, one process a GPU. Per number of rows, in microseconds: a sum inside a replayed CUDA graph of 16,
and the processor time of queueing one from Python. `--device cpu` tries the script itself, over Gloo.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

IN_GRAPH, REPLAYS, QUEUED = 16, 20, 50
TIMEOUT_S = 300.0
Sum = Callable[[Tensor], object]


def in_graph_us(sum_rows: Sum, rows: Tensor) -> float:
    """One sum of a replayed graph; rows are zeros, which stay so however often they are summed."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            sum_rows(rows)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(IN_GRAPH):
            sum_rows(rows)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / REPLAYS / IN_GRAPH * 1e3


def queueing_us(sum_rows: Sum, rows: Tensor) -> float:
    """What one takes this thread, with as many before it as fit the device's queue."""
    if rows.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    began_s = time.perf_counter()
    for _ in range(QUEUED):
        sum_rows(rows)
    took_s = time.perf_counter() - began_s
    if rows.is_cuda:
        torch.cuda.synchronize()
    return took_s / QUEUED * 1e6


def run_rank(rank: int, port: int, args: argparse.Namespace) -> None:
    store = TCPStore("127.0.0.1", port, args.ranks)
    sums: dict[str, Sum] = {}
    if args.device == "cpu":
        dist.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
        device = torch.device("cpu")
        sums["gloo"] = dist.all_reduce
    else:
        from kvrelay.engine.cuda.symmetric_sum import SymmetricSum

        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=args.ranks, device_id=device)
        sums["symmetric"] = SymmetricSum(device, torch.bfloat16, args.columns, max(args.rows), args.ranks)
        sums["nccl"] = dist.all_reduce
    if rank == 0:
        print(f"{'rows':>8}" + "".join(f"{name + ' µs':>16}{'queueing µs':>16}" for name in sums), flush=True)
    for num_rows in args.rows:
        rows = torch.zeros((num_rows, args.columns), dtype=torch.bfloat16, device=device)
        line = f"{num_rows:>8}"
        for sum_rows in sums.values():
            summed = sum_rows(rows)
            # In the engine what is summed lies in the buffer of the sum before.
            operand = summed if isinstance(summed, Tensor) else rows
            in_graph = f"{in_graph_us(sum_rows, operand):.1f}" if rows.is_cuda else "-"
            line += f"{in_graph:>16}{queueing_us(sum_rows, operand):>16.1f}"
        if rank == 0:
            print(line, flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 256, 1024, 4096, 8192])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    store = TCPStore("127.0.0.1", 0, args.ranks, True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, store.port, args)) for rank in range(args.ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(TIMEOUT_S)
        if rank.exitcode != 0:
            for other in ranks:
                other.kill()
            raise SystemExit(f"{rank.name} ended with {rank.exitcode}")


if __name__ == "__main__":
    main()
