"""Plays the fault matrix and writes it down: from the repository's root,
``python -m tests.fault_matrix.run --out docs/fault-matrix.md``.

Exit status 0: every cell is green, and with ``--check`` the given page says so of the same cells.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import SystemRandom
from typing import Final

from tests.fault_matrix.cell import CellResult
from tests.fault_matrix.page import Figures, markdown, verdicts_of
from tests.fault_matrix.play import Player, possible_cells

NUM_LANES: Final = 5
"""Clusters side by side: most of the time they wait, for leases and for what counts as dead."""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the matrix there, as Markdown")
    parser.add_argument(
        "--check", type=Path, help="compare with this page which cells there are and are green"
    )
    parser.add_argument("--states", nargs="*", default=(), help="only these rows")
    parser.add_argument("--faults", nargs="*", default=(), help="only these columns")
    parser.add_argument("--lanes", type=int, default=NUM_LANES, help="clusters side by side")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1 << 32), help="of all prompts")
    parser.add_argument("--keep", type=Path, help="keep the logs in this folder")
    given = parser.parse_args()
    started_s = time.monotonic()
    cells = possible_cells(given.states, given.faults)
    print(f"fault matrix: {len(cells)} cells, seed {given.seed}", flush=True)
    results = asyncio.run(_play(given, cells))
    figures = Figures(tuple(results), time.monotonic() - started_s, given.seed)
    if given.out is not None:
        given.out.write_text(markdown(figures))
    complaints = [
        f"{result.state} x {result.fault}: {result.complaint}" for result in results if not result.is_green
    ]
    if given.check is not None:
        complaints += _differences(given.check.read_text(), markdown(figures))
    for complaint in complaints:
        print(f"RED: {complaint}")
    print(f"{len(results)} cells in {figures.took_s:.0f} s, {len(complaints)} complaints")
    return 1 if complaints else 0


async def _play(given: argparse.Namespace, cells) -> list[CellResult]:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
    with tempfile.TemporaryDirectory(prefix="kvrelay-matrix-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return await Player(folder, given.seed, _tell).play(cells, given.lanes)


def _tell(result: CellResult) -> None:
    pause = "" if result.pause_s is None else f", pause {result.pause_s:.2f} s"
    free = "" if result.free_s is None else f", free after {result.free_s:.2f} s"
    verdict = "green" if result.is_green else "RED"
    print(
        f"{verdict} {result.state} x {result.fault}: {result.client_view}{pause}{free} {result.complaint}",
        flush=True,
    )


def _differences(page: str, now: str) -> list[str]:
    said, seen = verdicts_of(page), verdicts_of(now)
    return [
        f"{cell}: the page says {said.get(cell, 'nothing')}, this run {seen.get(cell, 'nothing')}"
        for cell in sorted(said.keys() | seen.keys())
        if said.get(cell) != seen.get(cell)
    ]


if __name__ == "__main__":
    sys.exit(main())
