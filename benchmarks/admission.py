"""Overload and greed in the simulator: what is served in time, with and without deadlines, by whom.

    python -m benchmarks.admission [--json] [--seconds N]

*Overload*: requests come at 0.7 to 3 times what 4 prefill nodes can compute (`prefill`), or 1 decode node
decode (`decode`). Requests either tell the router their limits or do not. Goodput is the number served
within the limits in each second; the last column compares it with the highest at any load. Of those refused
when they came, a share is served all the same (`trials`): those in time show how many refusals are false.

*Greed*: ten tenants send as much as half of the cluster can serve, an eleventh as much again as each of them
ten times. Shown is the share of the modest tenants' requests that are served in time: without the eleventh,
beside it as one tenant among others, and with nobody's name given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvrelay.core.service_terms import ServiceTerms
from kvrelay.simulator.cost_model import load_cost_model
from kvrelay.simulator.made_trace import Crowd, make_trace
from kvrelay.simulator.run import simulate
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.simulation import Simulation
from kvrelay.simulator.summary import Summary
from kvrelay.simulator.trace import Trace

LOADS: Final = (0.7, 1.0, 1.5, 2.0, 3.0)
NUM_MODEST: Final = 10
GREED: Final = 10.0
_RATE: Final = 72.0
"""Requests a second that keep 4 prefill nodes just busy, about."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is scarce. `scale`: load 1.0 is so many times what keeps the prefill nodes busy."""

    name: str
    num_decode_nodes: int
    mean_output_tokens: int
    scale: float
    ttft_limit_s: float
    total_limit_s: float


SETTINGS: Final = (
    Setting("prefill", 4, 60, 1.0, 0.5, 1e9),
    Setting("decode", 1, 500, 0.45, 2.0, 20.0),
)


def overload(setting: Setting, seconds: float) -> list[dict[str, Any]]:
    """One row for each load, without and with deadlines."""
    rows = []
    for has_deadlines in (False, True):
        for load in LOADS:
            trace = make_trace(
                int(_RATE * setting.scale * load * seconds), mean_output_tokens=setting.mean_output_tokens
            )
            summary, _ = _run(trace, setting, load * setting.scale, has_deadlines)
            rows.append(_row(setting, load, has_deadlines, summary))
    for row in rows:
        alike = [other["goodput_per_s"] for other in rows if other["deadlines"] is row["deadlines"]]
        row["of_best"] = row["goodput_per_s"] / max(*alike, 1e-9)
    return rows


def _run(trace: Trace, setting: Setting, load: float, has_deadlines: bool) -> tuple[Summary, Simulation]:
    scenario = Scenario(
        num_prefill_nodes=4,
        num_decode_nodes=setting.num_decode_nodes,
        cache_blocks=1000,
        policy="kvrelay",
        load=load,
        ttft_limit_s=setting.ttft_limit_s,
        itl_limit_s=1.0,
        total_limit_s=setting.total_limit_s,
        has_deadlines=has_deadlines,
        trial_share=0.05,
    )
    return simulate(trace, scenario, load_cost_model("h100"), pooled_rate=0.0)


def _row(setting: Setting, load: float, has_deadlines: bool, summary: Summary) -> dict[str, Any]:
    return {
        "scarce": setting.name,
        "load": load,
        "deadlines": has_deadlines,
        "goodput_per_s": summary.goodput_per_s,
        "goodput": summary.goodput,
        "ttft_p99_s": summary.ttft_s.p99,
        "refused": summary.refused / summary.requests,
        "by_reason": summary.refused_by_reason,
        "trials": summary.trials,
        "trials_in_time": summary.trials_in_time,
    }


def greed(seconds: float) -> list[dict[str, Any]]:
    """Who is served in time, for each way to look at the tenants."""
    modest = [Crowd(ServiceTerms(tenant=f"t{number}")) for number in range(NUM_MODEST)]
    greedy = Crowd(ServiceTerms(tenant="greedy"), GREED)
    cases = {"modest alone": (modest, 0.75), "with a greedy one": ([*modest, greedy], 1.5)}
    rows = []
    for name, (crowds, load) in cases.items():
        for named in (True, False) if greedy in crowds else (True,):
            trace = make_trace(int(_RATE * load * seconds), mean_output_tokens=60, crowds=crowds)
            tenants = np.array([terms.tenant for terms in trace.terms])
            if not named:
                trace = make_trace(int(_RATE * load * seconds), mean_output_tokens=60)
            _, done = _run(trace, SETTINGS[0], load, has_deadlines=True)
            ttft_s = np.array(done.seen.ttft_s)
            is_good = (ttft_s >= 0) & (ttft_s <= SETTINGS[0].ttft_limit_s)
            each = [float(is_good[tenants == f"t{number}"].mean()) for number in range(NUM_MODEST)]
            rows.append(
                {
                    "case": name if named else f"{name}, no names",
                    "modest_mean": float(np.mean(each)),
                    "modest_least": min(each),
                    "greedy": float(is_good[tenants == "greedy"].mean()) if greedy in crowds else None,
                }
            )
    return rows


def report(overloads: Sequence[Sequence[dict[str, Any]]], greeds: Sequence[dict[str, Any]]) -> list[str]:
    """For people."""
    lines = []
    for rows in overloads:
        lines += [
            "| scarce | deadlines | load | goodput/s | in time | TTFT p99 s | refused | at once / later"
            " | trials in time | of best |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *map(_line, rows),
            "",
        ]
    lines += ["| tenants | modest in time | least of them | greedy in time |", "|---|--:|--:|--:|"]
    for row in greeds:
        shown = "-" if row["greedy"] is None else f"{row['greedy']:.0%}"
        lines.append(f"| {row['case']} | {row['modest_mean']:.1%} | {row['modest_least']:.1%} | {shown} |")
    return lines


def _line(row: dict[str, Any]) -> str:
    reasons = row["by_reason"]
    told = "told" if row["deadlines"] else "-"
    return (
        f"| {row['scarce']} | {told} | {row['load']} | {row['goodput_per_s']:.1f} | {row['goodput']:.0%}"
        f" | {row['ttft_p99_s']:.2f} | {row['refused']:.0%}"
        f" | {reasons.get('deadline', 0)} / {reasons.get('dropped', 0)}"
        f" | {row['trials_in_time']} of {row['trials']} | {row['of_best']:.0%} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=15.0, help="for how long requests come")
    options = parser.parse_args(arguments)
    overloads = [overload(setting, options.seconds) for setting in SETTINGS]
    greeds = greed(options.seconds)
    if options.json:
        print(json.dumps({"overload": overloads, "greed": greeds}))
    else:
        print("\n".join(report(overloads, greeds)))


if __name__ == "__main__":
    main()
