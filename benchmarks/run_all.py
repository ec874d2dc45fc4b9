"""Run every benchmark, one after the other, and stop at the first that fails.

    python -m benchmarks.run_all [--json FILE]

With `--json FILE` the figures of all of them are written there as one object, by benchmark.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = (
    "engine_vs_transformers",
    "cluster_overhead",
    "kv_transfer",
    "prefix_pull",
    "router_session",
    "client_stream",
    "proxy_streams",
    "router_core",
    "block_index",
    "placement_decision",
    "admission",
    "refusals",
    "router_restart",
    "client_tokenize",
    "footprint",
)


def run(name: str, *, as_json: bool) -> object:
    """One benchmark in its own process; returns its figures, or prints them and returns None."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    if not as_json:
        print(f"\n== {name}", flush=True)
        subprocess.run(command, check=True)
        return None
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    figures = {name: run(name, as_json=args.json is not None) for name in BENCHMARKS}
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
