"""How `pd_gpu` shows its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOAD_PAIRS = ("ttft", "itl", "second")
GOODPUTS = ("goodput", "goodput later", "goodput of decode")
IDLE_NAMES = ("ttft", "second", "second max", "step")
Figures = Mapping[str, float]


def load_line(figures: Figures) -> str:
    """One cell of one system, p50 / p99 in ms."""
    text = _counts(figures)
    if "goodput" not in figures:
        return text
    for name in LOAD_PAIRS:
        text += f"  {name} {figures[f'{name} p50']:.1f} / {figures[f'{name} p99']:.1f}"
    return text + "  " + "  ".join(f"{name} {figures[name]:.1%}" for name in GOODPUTS)


def idle_line(figures: Figures) -> str:
    """One prompt length of one system, medians in ms."""
    text = _counts(figures)
    if "step" not in figures:
        return text
    return text + "".join(f"  {name} {figures[name]:.1f}" for name in IDLE_NAMES)


def _counts(figures: Figures) -> str:
    return f"{figures['requests']:4.0f} requests, {figures['failed']:.0f} failed"


def print_ratios(systems: Mapping[str, Any]) -> None:
    """Beside kvrelay's figures each other system's, and how many times kvrelay's they are."""
    ours = systems.get("kvrelay")
    others = [name for name in systems if name != "kvrelay"]
    if ours is None or not others:
        return
    load_names = [f"{name} {share}" for name in LOAD_PAIRS for share in ("p50", "p99")] + list(GOODPUTS)
    for kind, names in (("idle", list(IDLE_NAMES)), ("load", load_names)):
        for cell, figures in ours[kind].items():
            theirs = {other: systems[other][kind].get(cell, {}) for other in others}
            columns = "".join(f"{other:>17}    ratio" for other in others)
            print(f"\n{f'{cell}, {kind}':18}{'kvrelay':>12}{columns}")
            for name in [*names, "failed"]:
                print(_ratio_line(name, figures, theirs))


def _ratio_line(name: str, ours: Figures, theirs: Mapping[str, Figures]) -> str:
    line = f"{name:18}{_number(name, ours.get(name)):>12}"
    for figures in theirs.values():
        value = figures.get(name)
        line += f"{_number(name, value):>17}{_ratio(value, ours.get(name)):>9}"
    return line


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name in GOODPUTS else f"{value:.0f}" if name == "failed" else f"{value:.1f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.2f}" if theirs is not None and ours else "-"
