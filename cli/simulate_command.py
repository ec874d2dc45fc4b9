"""`kvrelay simulate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from kvrelay.simulator.scenario import Scenario
    from kvrelay.simulator.summary import Summary

_EPILOG: Final = """Examples:

kvrelay simulate conversation_trace.jsonl --prefill 8 --load 1.0 --no-decode

kvrelay simulate trace.jsonl --prefill 32 --decode 16 --policy mooncake-pull --cost-model h100 --json out.json

TRACE is one of Mooncake's JSON-lines files (with prefix ids), or a .csv of Azure's LLM inference trace.

Load 1.0 means: prefill without any cache would keep the prefill nodes exactly busy."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("simulate", epilog=_EPILOG)(simulate)


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="The trace file.")],
    prefill: Annotated[int, typer.Option(metavar="N", min=1, help="Prefill nodes.")] = 8,
    decode: Annotated[int, typer.Option(metavar="M", min=1, help="Decode nodes.")] = 8,
    cache_blocks: Annotated[
        int, typer.Option(metavar="C", min=1, help="Blocks in each prefill node's prefix cache.")
    ] = 1000,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a block.")] = 512,
    load: Annotated[float, typer.Option(metavar="L", help="What arrivals are compressed to.")] = 1.0,
    policy: Annotated[
        str,
        typer.Option(
            help="kvrelay, random, round-robin, least-loaded, consistent-hash, sglang, dynamo, mooncake or"
            " mooncake-pull."
        ),
    ] = "kvrelay",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same output.")] = 0,
    cost_model: Annotated[
        str, typer.Option(metavar="FILE", help="A cost-model file, or: independent, h100.")
    ] = "independent",
    no_decode: Annotated[
        bool, typer.Option("--no-decode", help="A request ends with its first token.")
    ] = False,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many requests of the file.")
    ] = None,
    queue_timeout_s: Annotated[
        float | None, typer.Option(help="Refuse what waits longer at the router. Default: nothing.")
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(min=1, help="Refuse what comes while so many wait. Default: nothing.")
    ] = None,
    deadlines: Annotated[
        bool, typer.Option("--deadlines", help="Requests tell the router their limits, and it refuses early.")
    ] = False,
    ttft_limit_ms: Annotated[float, typer.Option(help="A good request's TTFT, at most.")] = 500.0,
    itl_limit_ms: Annotated[
        float, typer.Option(help="99 % of a good request's own gaps between tokens, at most.")
    ] = 25.0,
    total_limit_s: Annotated[
        float | None, typer.Option(help="A good request's whole time, at most. Default: any.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write one JSON object there; - is stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write the distribution of TTFT there.")
    ] = None,
) -> None:
    """Run the router's own core and a placement policy over a trace, on a virtual clock."""
    from kvrelay.simulator.cost_model import load_cost_model
    from kvrelay.simulator.run import check_fits_decode
    from kvrelay.simulator.run import simulate as run_simulation
    from kvrelay.simulator.scenario import Scenario
    from kvrelay.simulator.trace_file import read_trace

    scenario = Scenario(
        num_prefill_nodes=prefill,
        num_decode_nodes=0 if no_decode else decode,
        cache_blocks=cache_blocks,
        policy=policy,
        load=load,
        seed=seed,
        queue_timeout_s=queue_timeout_s if queue_timeout_s is not None else 1e9,
        max_queued=max_queued if max_queued is not None else 10**9,
        ttft_limit_s=ttft_limit_ms / 1e3,
        itl_limit_s=itl_limit_ms / 1e3,
        total_limit_s=total_limit_s if total_limit_s is not None else 1e9,
        has_deadlines=deadlines,
    )
    _check_policy(scenario)
    costs = load_cost_model(cost_model)
    requests_read = read_trace(trace, block_tokens, requests)
    if not no_decode:
        check_fits_decode(requests_read, costs)
    summary, simulation = run_simulation(requests_read, scenario, costs)
    if plot is not None:
        from kvrelay.simulator.plot import ttft_svg

        title = f"{summary.trace}, {policy}, {prefill} prefill nodes, load {load:g}"
        _write(plot, ttft_svg(simulation.seen.ttft_s, title))
    if json_file is not None:
        _write(json_file, json.dumps(summary.as_json(), indent=2) + "\n")
    if json_file is None or str(json_file) != "-":
        print("\n".join(summary_lines(summary)))


def summary_lines(summary: Summary) -> list[str]:
    """The figures for people."""
    ttft, itl = summary.ttft_s, summary.itl_s
    lines = [
        f"{summary.trace}: {summary.requests} requests, {summary.prefill_nodes} prefill and"
        f" {summary.decode_nodes or 'no'} decode nodes, caches of {summary.cache_blocks} blocks of"
        f" {summary.block_tokens} tokens, load {summary.load:g}, policy {summary.policy},"
        f" cost model {summary.cost_model}, seed {summary.seed}",
        f"TTFT     mean {_s(ttft.mean)}  p50 {_s(ttft.p50)}  p90 {_s(ttft.p90)}  p99 {_s(ttft.p99)}"
        f"  max {_s(ttft.max)}",
    ]
    if summary.decode_nodes:
        lines.append(
            f"ITL      mean {_ms(itl.mean)}  p50 {_ms(itl.p50)}  p90 {_ms(itl.p90)}  p99 {_ms(itl.p99)}"
        )
    limits = f"TTFT <= {_ms(summary.ttft_limit_s)}"
    if summary.decode_nodes:
        limits += f" and 99 % of own ITL <= {_ms(summary.itl_limit_s)}"
    if summary.total_limit_s < 1e9:
        limits += f" and in all <= {_s(summary.total_limit_s)}"
    reasons = ", ".join(f"{number} {reason}" for reason, number in summary.refused_by_reason.items())
    trials = f"; {summary.trials_in_time} of {summary.trials} trials in time" if summary.trials else ""
    return [
        *lines,
        f"goodput  {summary.goodput:.1%} ({summary.goodput_per_s:.2f}/s): {limits}",
        f"cache    {summary.hit_rate:.1%} hit, {summary.pooled_hit_rate:.1%} in one pooled cache;"
        f" {summary.pulled_rate:.1%} pulled, in {summary.pulls} pulls",
        f"load     prefill nodes busy {summary.prefill_utilisation:.1%}, the busiest"
        f" {summary.balance_max_over_mean:.3f} times the mean",
        f"refused  {summary.refused}{f' ({reasons})' if reasons else ''}{trials}",
    ]


def _check_policy(scenario: Scenario) -> None:
    """Before a long trace is read."""
    from kvrelay.core.errors import ConfigError
    from kvrelay.simulator.policies import POLICIES

    if scenario.policy not in POLICIES:
        message = f"--policy {scenario.policy} is unknown; known: {', '.join(POLICIES)}"
        raise ConfigError(message, field="policy")


def _write(path: Path, text: str) -> None:
    from kvrelay.core.errors import ConfigError

    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", field="json") from error


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f} s"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g} ms"
