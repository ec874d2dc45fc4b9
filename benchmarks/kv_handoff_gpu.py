"""A handoff's KV between two GPUs of one host, through the KV transfer service.

    python -m benchmarks.kv_handoff_gpu [--json] [--timeline] [--tokens 1024 4096 8192 32768]
                                        [--slot-mib 16 64 256] [--num-slots 8]

Two processes, each seeing both GPUs: the sender's cache on GPU 0, the receiver's on GPU 1, both of the shape
of Llama-3.1-8B with random content in shuffled blocks. For each staging slot size and prompt length:

* `handoff`: from the first `push_ready` (all layers, in groups, link open and offer granted) until the
  receiver's acknowledgement has come back: p50 of the repeats, and the GB/s that makes.
* its parts, which overlap: `gather`, `wire` and `scatter`, the time in which at least one of each was under
  way, from being queued until it was seen to be done.
* `exact`: whether every layer's checksum, taken on each GPU by torch's own indexing, is the same on both.

Beside it: the same blocks by NIXL, one descriptor a block, layer and K or V, from cache to cache; and what a
plain copy from GPU 0 to GPU 1 gives. `--timeline` prints one transfer of 4,096 tokens (or the longest asked
for, if that is shorter) for each slot size, event by event on both sides. `--device cpu --layers 2` tries the
script itself without a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.kv_handoff_side import ORDER_TIMEOUT_S, BenchFailed, Options, child_process
from benchmarks.kv_handoff_timeline import timeline_lines

START_TIMEOUT_S = 240.0
NVLINK_FLOOR_GB_PER_S = 50.0


class Process:
    """The parent's handle of one child."""

    def __init__(self, role: str, folder: Path, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self.role = role
        self.log_path = folder / f"{role}.log"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=child_process, args=(role, theirs, str(self.log_path), options), daemon=True
        )
        self.process.start()
        theirs.close()

    def order(self, name: str, *arguments: Any) -> None:
        self.pipe.send((name, arguments))

    def answer(self, timeout_s: float = ORDER_TIMEOUT_S) -> Any:
        try:
            if not self.pipe.poll(timeout_s):
                raise BenchFailed(f"the {self.role} did not answer within {timeout_s:.0f} s")
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise BenchFailed(f"the {self.role} died, exit code {self.process.exitcode}") from None
        if kind == "error":
            raise BenchFailed(answer)
        return answer

    def ask(self, name: str, *arguments: Any) -> Any:
        self.order(name, *arguments)
        return self.answer()

    def end(self) -> None:
        with suppress(OSError):
            self.order("quit")
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)

    def log_tail(self) -> str:
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return f"---- the {self.role}'s output, its end ----\n" + "\n".join(text.splitlines()[-60:])

    def lanes(self) -> list[str]:
        """What UCX says of the way that its writes take."""
        path = Path(f"{self.log_path}.ucx")
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        found: list[str] = []
        for index, line in enumerate(lines):
            if "ucp_put" in line:
                for row in lines[index : index + 10]:
                    cells = row.partition("]   ")[2].strip() or row.strip()
                    if (
                        cells.startswith("+")
                        and len(found)
                        and found[-1].startswith("| ")
                        and ".." in found[-1]
                    ):
                        break
                    if cells.startswith("|") and cells not in found:
                        found.append(cells)
        return found


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        child_options = Options(
            options.device, options.layers, options.layer_group, max(options.tokens), options.num_slots
        )
        self.receiver = Process("receiver", folder, child_options)
        self.sender = Process("sender", folder, child_options)
        self.number = 0
        self.report: dict[str, Any] = {"benchmark": "kv_handoff_gpu", "device": options.device, "rows": []}
        self.faults: list[str] = []

    def run(self) -> None:
        self.start()
        for slot_mib in self.options.slot_mib:
            self.with_slots(slot_mib)
        for name, part in (("block_wise", self.block_wise), ("ceiling", self.ceiling)):
            try:
                part()
            except BenchFailed as error:
                self.fault(f"{name}: {error}")

    def start(self) -> None:
        for side in (self.receiver, self.sender):
            side.order("start")
        for side in (self.receiver, self.sender):
            found = side.answer(START_TIMEOUT_S)
            self.report[side.role] = found
            self.say(f"{side.role}: {', '.join(f'{key} {value}' for key, value in found.items())}")

    def with_slots(self, slot_mib: int) -> None:
        opened = [side.ask("open", slot_mib << 20) for side in (self.receiver, self.sender)]
        address = opened[0]["address"]
        self.say(f"\nslots of {slot_mib} MiB, {opened[1]['lanes']}")
        for num_tokens in self.options.tokens:
            row = {"slot_mib": slot_mib, **self.measure(num_tokens, address)}
            self.report["rows"].append(row)
            self.say(
                f"{num_tokens:6d} tokens {row['mb']:7.1f} MB | handoff p50 {row['handoff_ms']:8.3f} ms"
                f" (best {row['handoff_best_ms']:.3f}) {row['gb_per_s']:6.1f} GB/s"
                f" | gather {row['gather_ms']:.3f} wire {row['wire_ms']:.3f}"
                f" ({row['wire_gb_per_s']:.1f} GB/s) scatter {row['scatter_ms']:.3f} ms"
                f" | {row['num_messages']} messages | exact {row['exact']}"
            )
            if not row["exact"]:
                self.fault(f"the KV of {num_tokens} tokens arrived wrong: {row['differences']}")
        if self.options.timeline:
            self.show_timeline(slot_mib, address)
        probed = self.sender.ask("link_gb_per_s")
        self.report.setdefault("probed_gb_per_s", []).extend(probed)
        self.say(f"the link's start-up probe found {', '.join(f'{rate:.1f}' for rate in probed)} GB/s")
        for side in (self.sender, self.receiver):
            side.ask("close")

    def show_timeline(self, slot_mib: int, address: str) -> None:
        num_tokens = min(4096, max(self.options.tokens))
        self.transfer(num_tokens, address)
        sides = (self.sender, self.receiver)
        for side in sides:
            side.ask("record")
        self.transfer(num_tokens, address)
        lines = timeline_lines({side.role: side.ask("recorded") for side in sides})
        self.report.setdefault("timelines", []).append({"slot_mib": slot_mib, "lines": lines})
        self.say(f"\n{num_tokens} tokens, slots of {slot_mib} MiB, since the first push_ready:")
        self.say("\n".join(lines))

    def transfer(self, num_tokens: int, address: str) -> dict[str, Any]:
        self.number += 1
        self.receiver.ask("expect", self.number, num_tokens)
        pushed = self.sender.ask("push", self.number, num_tokens, address)
        return {**pushed, **self.receiver.ask("received")}

    def measure(self, num_tokens: int, address: str) -> dict[str, Any]:
        for _ in range(3):
            self.transfer(num_tokens, address)
        runs = [self.transfer(num_tokens, address) for _ in range(self.options.repeats)]
        self.receiver.ask("clear")
        self.transfer(num_tokens, address)
        differences = self.compare(num_tokens)
        p50 = {
            name: statistics.median(run[name] for run in runs)
            for name in ("handoff_s", "gather_s", "wire_s", "scatter_s")
        }
        num_bytes = runs[0]["num_bytes"]
        return {
            "num_tokens": num_tokens,
            "mb": num_bytes / 1e6,
            "num_messages": runs[0]["num_messages"],
            "gb_per_s": num_bytes / p50["handoff_s"] / 1e9,
            "wire_gb_per_s": num_bytes / p50["wire_s"] / 1e9,
            "handoff_best_ms": min(run["handoff_s"] for run in runs) * 1e3,
            **{name.replace("_s", "_ms"): value * 1e3 for name, value in p50.items()},
            "exact": not differences,
            "differences": differences,
        }

    def compare(self, num_tokens: int) -> str:
        """Which layers of the latest transfer differ, empty when none does."""
        sent, received = (
            side.ask("checksums", self.number, num_tokens) for side in (self.sender, self.receiver)
        )
        if len(set(sent)) < len(sent):
            return "the sender's layers are not random"
        wrong = [
            layer for layer, (mine, theirs) in enumerate(zip(sent, received, strict=True)) if mine != theirs
        ]
        return f"layers {wrong}" if wrong else ""

    def block_wise(self) -> None:
        num_tokens = min(4096, max(self.options.tokens))
        self.number += 1
        for side in (self.receiver, self.sender):
            side.ask("open_agent")
        self.receiver.ask("clear")
        endpoint = self.receiver.ask("block_endpoint")
        theirs = self.receiver.ask("block_list", self.number, num_tokens)
        self.receiver.order("progress")
        row = self.sender.ask("push_blocks", self.number, num_tokens, endpoint, theirs, 6)
        self.receiver.order("nothing")
        for _ in range(2):
            self.receiver.answer()
        seconds = row["init_s"] + row["wire_s"]
        row["differences"] = self.compare(num_tokens)
        row["gb_per_s"] = row["num_bytes"] / seconds / 1e9
        row["wire_gb_per_s"] = row["num_bytes"] / row["wire_s"] / 1e9
        self.report["block_wise"] = row
        self.say(
            f"\nblock-wise, {num_tokens} tokens as {row['num_descriptors']} descriptors:"
            f" {seconds * 1e3:.2f} ms {row['gb_per_s']:.1f} GB/s"
            f" | making the request {row['init_s'] * 1e3:.2f} wire {row['wire_s'] * 1e3:.2f} ms"
            f" ({row['wire_gb_per_s']:.1f} GB/s)"
            f" | exact {not row['differences']}"
        )
        if row["differences"]:
            self.fault(f"block-wise KV arrived wrong: {row['differences']}")

    def ceiling(self) -> None:
        self.report["ceiling_gb_per_s"] = found = self.sender.ask("ceiling_gb_per_s")
        self.say(f"plain copy of 1 GiB from GPU 0 to GPU 1: {found:.1f} GB/s")

    def conclude(self) -> None:
        """Once the children are gone, so that UCX's log is complete."""
        self.report["ucx_lanes"] = lanes = self.sender.lanes()
        self.say("\nUCX's own word on the sender's writes:\n  " + "\n  ".join(lanes or ["none to be had"]))
        rates = [row["wire_gb_per_s"] for row in self.report["rows"]]
        if self.options.device == "cuda" and rates and max(rates) < NVLINK_FLOOR_GB_PER_S:
            self.fault(f"no NVLink: the wire gave {max(rates):.1f} GB/s at best; see the lanes above")
        self.report["faults"] = self.faults

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self.options.json else sys.stdout, flush=True)

    def logs(self) -> str:
        return "\n".join(side.log_tail() for side in (self.sender, self.receiver))


def give_up(bench: Bench, deadline_s: float) -> None:
    """From a timer: nothing that hangs may keep the GPUs."""
    print(f"FAULT: not done after {deadline_s:.0f} s, killed\n{bench.logs()}", file=sys.stderr, flush=True)
    for side in (bench.sender, bench.receiver):
        side.process.kill()
    os._exit(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; the table goes to stderr")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192, 32768])
    parser.add_argument("--slot-mib", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--num-slots", type=int, help="to send, to receive, of a transfer; else the default")
    parser.add_argument("--timeline", action="store_true", help="print one transfer event by event")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--layer-group", type=int, default=8)
    parser.add_argument("--deadline-s", type=float, default=420.0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kv_handoff_gpu."))
    bench = Bench(options, folder)
    timer = threading.Timer(options.deadline_s, give_up, (bench, options.deadline_s))
    timer.daemon = True
    timer.start()
    try:
        bench.run()
    except BenchFailed as error:
        bench.fault(str(error))
    finally:
        bench.sender.end()
        bench.receiver.end()
    bench.conclude()
    timer.cancel()
    if bench.faults:
        print(bench.logs(), file=sys.stderr, flush=True)
        if shutil.which("nvidia-smi"):
            subprocess.run(["nvidia-smi", "topo", "-m"], stdout=sys.stderr, timeout=30, check=False)
        print(f"the whole logs are in {folder}", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps(bench.report))
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
