"""`kvrelay status`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.options import DEFAULT_ROUTER, RouterAddresses

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvrelay.core.cluster_view import ClusterState, ModelInfo

_EPILOG = """Examples:

kvrelay status

kvrelay status --router host-a:7070 --watch

kvrelay status --json | jq .counters

Blocks: held by live requests / kept as prefix cache / free, where what is cached counts as free."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("status", epilog=_EPILOG)(status)


def status(
    routers: RouterAddresses = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it, until Ctrl-C.")] = False,
    interval_s: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", min=0.1, max=3600, help="Between two states."),
    ] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object (one a line with --watch).")
    ] = False,
) -> None:
    """Show a router's nodes, live requests and counters."""
    addresses = list(routers or [DEFAULT_ROUTER])
    asyncio.run(_watch(addresses, interval_s, as_json) if watch else _once(addresses, as_json))


async def _once(addresses: list[str], as_json: bool) -> None:
    from kvrelay.client import AsyncClient

    async with AsyncClient(addresses) as client:
        state, models = await client.cluster_state(), await client.list_models()
    _print(state, models, as_json)


async def _watch(addresses: list[str], interval_s: float, as_json: bool) -> None:
    from kvrelay.client import AsyncClient

    async with AsyncClient(addresses) as client:
        if as_json or not sys.stdout.isatty():
            async for state in client.watch_cluster(interval_s=interval_s):
                _print(state, await client.list_models(), as_json)
            return
        from rich.live import Live

        with Live(auto_refresh=False, screen=True) as live:
            async for state in client.watch_cluster(interval_s=interval_s):
                live.update(_rendered(state, await client.list_models()), refresh=True)


def _print(state: ClusterState, models: Sequence[ModelInfo], as_json: bool) -> None:
    from kvrelay.cli.status_view import plain_text, state_as_json

    if as_json:
        print(json.dumps(state_as_json(state, models)), flush=True)
    elif sys.stdout.isatty():
        import rich

        rich.print(_rendered(state, models))
    else:
        print(plain_text(state, models), flush=True)


def _rendered(state: ClusterState, models: Sequence[ModelInfo]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from kvrelay.cli.status_view import NODE_COLUMNS, footer_lines, headline, node_rows

    table = Table(*NODE_COLUMNS)
    for row in node_rows(state):
        table.add_row(*(Text(cell) for cell in row))
    return Group(Text(headline(state), style="bold"), table, *map(Text, footer_lines(state, models)))
