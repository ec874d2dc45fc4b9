"""Many seeds on all cores, a summary, and for each seed that fails a transcript of how it came to that."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Final

from kvrelay.simulator.faults.simulate import Outcome, run_seed

MAX_TRANSCRIPTS: Final = 3
"""More failures are listed, without their story."""
TRANSCRIPT_LINES: Final = 150
_CHUNK: Final = 10


@dataclass(slots=True)
class Summary:
    """What all seeds gave together."""

    num_seeds: int = 0
    num_steps: int = 0
    num_checks: int = 0
    num_tokens: int = 0
    virtual_s: float = 0.0
    failures: list[Outcome] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one more seed."""
        self.num_seeds += 1
        self.num_steps += outcome.num_steps
        self.num_checks += outcome.num_checks
        self.num_tokens += outcome.num_tokens
        self.virtual_s += outcome.virtual_s
        self.ends.update(outcome.ends)
        self.faults.update(outcome.faults)
        self.counters.update(outcome.counters)
        if outcome.violation:
            self.failures.append(outcome)

    def text(self, seconds: float) -> str:
        """For people."""
        return "\n".join(
            (
                f"{self.num_seeds} seeds in {seconds:.1f} s ({self.num_seeds / seconds:.1f} a second),"
                f" {self.virtual_s / 3600:.1f} virtual hours, {self.num_steps} steps,"
                f" {self.num_checks} checks",
                f"requests: {_counts(self.ends)}; {self.num_tokens} tokens, each compared",
                f"faults: {_counts(self.faults)}",
                f"what was done about them: {_counts(self.counters)}",
                f"violations: {len(self.failures)}",
            )
        )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counter.most_common())


def run_seeds(seeds: Sequence[int], num_processes: int) -> Iterator[Outcome]:
    """The outcome of each, in the order of `seeds`."""
    if num_processes == 1:
        yield from map(run_seed, seeds)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_seed, seeds, chunksize=_CHUNK)


def tell_failure(seed: int, num_lines: int) -> str:
    """Play a seed that fails once more, and tell the last part of its story."""
    outcome = run_seed(seed, keeps_transcript=True)
    lines = outcome.transcript[-num_lines:]
    left_out = len(outcome.transcript) - len(lines)
    head = [f"--- seed {seed}: {outcome.violation}"]
    if left_out:
        head.append(f"    ({left_out} earlier lines: make simulate-faults SEEDS=1 FIRST_SEED={seed})")
    return "\n".join((*head, *lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 where a seed has failed."""
    options = _parse(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    summary, started_s = Summary(), time.monotonic()
    for outcome in _with_progress(run_seeds(seeds, options.processes), len(seeds)):
        summary.add(outcome)
        if outcome.violation:
            print(f"seed {outcome.seed}: {outcome.violation}", flush=True)
    num_lines = sys.maxsize if options.seeds == 1 else TRANSCRIPT_LINES
    for failure in summary.failures[:MAX_TRANSCRIPTS]:
        print(tell_failure(failure.seed, num_lines))
    print(summary.text(time.monotonic() - started_s))
    return 1 if summary.failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvrelay.simulator.faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes must be at least 1")
    return options


def _with_progress(outcomes: Iterable[Outcome], num_seeds: int) -> Iterator[Outcome]:
    """A line on stderr now and then."""
    step = max(1000, num_seeds // 20)
    for number, outcome in enumerate(outcomes, start=1):
        yield outcome
        if number % step == 0:
            print(f"{number} of {num_seeds} seeds", file=sys.stderr, flush=True)
