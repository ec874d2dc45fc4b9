"""docs/fault-matrix.md: the results as people read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.fault_matrix.cell import GRACE_S, LEASE_S, CellResult
from tests.fault_matrix.faults import FAULTS
from tests.fault_matrix.impossible import why_impossible
from tests.fault_matrix.states import STATES

GREEN: Final = "✓"
RED: Final = "✗ RED"
IMPOSSIBLE: Final = "–"
UNPLAYED: Final = "?"
_INTRO: Final = f"""# Fault matrix

Written by `make fault-matrix`; nothing here is typed by hand. Each cell is a run on real processes: two routers, two prefill nodes, two decode nodes, a proxy and a client of the library, with default leases and time-outs. A request is brought into a state, a fault strikes, and what follows is looked at. The engine is `sim`: it has no model, but real scheduling, blocks and transfers over TCP; its KV is stamped and checked, and every prompt and seed have one right answer.

A cell is green ({GREEN}) when

- the client got each token exactly once, in order, and all of them are those of the unbroken run, drawn with a seed at temperature 0.9 (or, where the caller gave up or left, what it got until then is the beginning of that);
- within the lease ({LEASE_S:g} s) after the request's end, or after what was stopped or cut was mended, no surviving node holds a block, an attempt or a transfer, and every router's books are empty ({GRACE_S:g} s are allowed on top, for reports to come);
- what was told to drain has left with exit status 0.

Otherwise it is red ({RED}), and the command fails. {IMPOSSIBLE}: it cannot occur; the reason is below. The number is the *longest pause*: the longest time without a token from the fault to the end, the wait for the first token included where it had not come. `sim` takes 20 ms for a decode step, and about 0.3 s or 1.6 s for the prefill of its prompt; the row's cell without a fault shows what it takes undisturbed.
"""
_FAULTS: Final = """## What the faults are

- **kill -9**: SIGKILL. Nodes and routers have spares, and nothing is started again before the cell has been judged.
- **SIGSTOP**: a node is continued when both routers count it as lost (silent for 5 s), a router when the request has ended and all nodes are free. A client counts a router as lost when it has not answered for 11 s; where tokens were flowing, for 5 s.
- **KV link cut**: every connection over which that KV moves is reset, and each new one too, until the request has ended. **Silent**: nothing passes any more, and nobody is told; a transfer is given up after 10 s, a pull after 5 s.
- **node–router cut**: the node's stream to the request's router is reset, and each new one too, until the other router has heard from all nodes that they hold nothing any more. **Silent**: nothing passes any more; the router counts the node as lost after 5 s, the node frees what that router made it hold after the lease.
- **client–router cut**: the same for the client's connection to that router.
- **SIGTERM**: drain. The process leaves when it holds nothing.
- **client goes away**: its connections are reset, and it never comes back; to the proxy it closes its connection.

A killed proxy breaks its callers' connections, which is what they see; what they asked is given up.

In the column KV link, it is the link over which the row's KV moves: to the decode node, or that of the pull. The nodes meant are those that serve the request, or would do as well where it has not been placed.

## How a state is known to be there
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run."""

    results: tuple[CellResult, ...]
    took_s: float
    seed: int


def markdown(figures: Figures) -> str:
    """The whole page."""
    by_cell = {(result.state, result.fault): result for result in figures.results}
    num_red = sum(not result.is_green for result in figures.results)
    summary = (
        f"{len(figures.results)} cells, {num_red} red, in {figures.took_s:.0f} s on {os.cpu_count()} cores,"
        f" seed {figures.seed}."
    )
    lines = [_INTRO, "## Overview", "", summary, "", *_overview(by_cell), "", _FAULTS]
    lines += [f"- **{state.title}**: {state.seen_by}." for state in STATES]
    lines += ["", "## Cell by cell", "", _DETAIL_TEXT]
    for state in STATES:
        lines += ["", f"### {state.title[0].upper()}{state.title[1:]}", "", *_details(state.key, by_cell)]
    return "\n".join(lines) + "\n"


_DETAIL_TEXT: Final = (
    "*Asked*: how often the client asked a router, and how many pairs of nodes the last router tried (more than"
    " 1: the request was continued). *All free*: from the fault until nobody held anything."
)


def _overview(by_cell: dict[tuple[str, str], CellResult]) -> Iterator[str]:
    yield "| " + " | ".join(["state", *(fault.title for fault in FAULTS)]) + " |"
    yield "|---|" + " :-: |" * len(FAULTS)
    for state in STATES:
        cells = [_short(state.key, fault.key, by_cell) for fault in FAULTS]
        yield "| " + " | ".join([state.title, *cells]) + " |"


def _short(state: str, fault: str, by_cell: dict[tuple[str, str], CellResult]) -> str:
    if why_impossible(state, fault):
        return IMPOSSIBLE
    result = by_cell.get((state, fault))
    if result is None:
        return UNPLAYED
    verdict = GREEN if result.is_green else RED
    return verdict if result.pause_s is None else f"{verdict} {result.pause_s:.2f} s"


def _details(state: str, by_cell: dict[tuple[str, str], CellResult]) -> Iterator[str]:
    yield "| fault | the client sees | asked | longest pause | all free | blocks leaked |"
    yield "|---|---|---|--:|--:|--:|"
    for fault in FAULTS:
        reason = why_impossible(state, fault.key)
        result = by_cell.get((state, fault.key))
        if reason:
            yield f"| {fault.title} | {IMPOSSIBLE} {reason} | | | | |"
        elif result is not None:
            yield f"| {fault.title} | {_detail(result)} |"


def _detail(result: CellResult) -> str:
    view = result.client_view if result.is_green else f"**{RED}** {result.complaint}".replace("|", "/")
    asked = ""
    if result.num_client_attempts:
        asked = f"{result.num_client_attempts} × router, {result.num_router_attempts} × nodes"
    pause = "" if result.pause_s is None else f"{result.pause_s:.2f} s"
    free = "never" if result.free_s is None else f"{result.free_s:.2f} s"
    return f"{view} | {asked} | {pause} | {free} | {result.num_leaked_blocks}"


def verdicts_of(page: str) -> dict[str, str]:
    """The overview of a page: ``row x column`` to its verdict, without times."""
    lines = page.partition("## Overview")[2].partition("\n## ")[0].splitlines()
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")
    ]
    if not rows:
        return {}
    head, *body = rows
    return {
        f"{row[0]} x {fault}": cell.split(" ")[0]
        for row in body
        for fault, cell in zip(head[1:], row[1:], strict=True)
    }
