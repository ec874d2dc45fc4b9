"""The soak's figures, judged and as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_GROWTH_MIB: Final = 8.0
"""Of a process that lives all the time, from the second third of the checkpoints to the last one."""
_MISHAPS: Final = {
    "kill": "killed (-9)",
    "stop": "SIGSTOP",
    "drain": "SIGTERM",
    "cut_stream": "streams cut",
    "cut_kv": "KV links cut or silenced",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Counts are since the start. `free_s`: from the end of load and mishaps until nobody held anything."""

    at_s: float
    num_answers: int
    num_tokens: int
    num_taken_up_by_client: int
    num_taken_up_by_router: int
    num_wrong: int
    errors: dict[str, int]
    mishaps: dict[str, int]
    free_s: float
    rss_mib: dict[str, float]


@dataclass(slots=True)
class Figures:
    """Of one soak. No `faults`: it was passed."""

    seed: int
    minutes: float
    checkpoints: list[Checkpoint]
    faults: list[str]


def growth_mib(checkpoints: Sequence[Checkpoint], name: str) -> float:
    """Mean of the last third of the checkpoints less that of the middle third."""
    third = max(1, len(checkpoints) // 3)
    values = [checkpoint.rss_mib[name] for checkpoint in checkpoints]
    middle, last = values[-2 * third : -third], values[-third:]
    return sum(last) / len(last) - sum(middle) / len(middle) if middle else 0.0


def growth_faults(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The processes that grew."""
    growths = {name: growth_mib(checkpoints, name) for name in checkpoints[-1].rss_mib}
    return [f"{name} grew by {grown:.1f} MiB" for name, grown in growths.items() if grown > MAX_GROWTH_MIB]


def print_checkpoint(checkpoint: Checkpoint) -> None:
    """One line, as it goes."""
    memory = " ".join(f"{name}={mib:.0f}" for name, mib in checkpoint.rss_mib.items())
    print(
        f"{checkpoint.at_s / 60:5.1f} min: {checkpoint.num_answers} answers, {checkpoint.num_wrong} wrong,"
        f" errors {checkpoint.errors}, mishaps {checkpoint.mishaps}, free after {checkpoint.free_s:.1f} s,"
        f" MiB {memory}",
        flush=True,
    )


def markdown(figures: Figures) -> str:
    """The table of docs/soak.md."""
    last = figures.checkpoints[-1]
    names = list(last.rss_mib)
    head = ["minute", "answers", "tokens", "taken up again", "errors", "wrong", "free after", *names]
    lines = [
        f"{figures.minutes:.1f} minutes, seed {figures.seed}. "
        + ", ".join(f"{title}: {last.mishaps.get(key, 0)}" for key, title in _MISHAPS.items())
        + ".",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --: |' * len(head)}",
    ]
    lines += [_row(checkpoint, names) for checkpoint in figures.checkpoints]
    growths = ", ".join(f"{name} {growth_mib(figures.checkpoints, name):+.1f}" for name in names)
    errors = ", ".join(f"{code}: {num}" for code, num in sorted(last.errors.items())) or "none"
    lines += ["", f"Growth in MiB, last third against the middle third: {growths}. Errors: {errors}.", ""]
    return "\n".join(lines)


def _row(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    taken_up = f"{checkpoint.num_taken_up_by_router} + {checkpoint.num_taken_up_by_client}"
    cells = [
        f"{checkpoint.at_s / 60:.1f}",
        str(checkpoint.num_answers),
        str(checkpoint.num_tokens),
        taken_up,
        str(sum(checkpoint.errors.values())),
        str(checkpoint.num_wrong),
        f"{checkpoint.free_s:.1f} s",
        *(f"{checkpoint.rss_mib[name]:.0f}" for name in names),
    ]
    return f"| {' | '.join(cells)} |"
