"""`kvrelay drain`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.options import DEFAULT_ROUTER, RouterAddresses

if TYPE_CHECKING:
    from kvrelay.client import AsyncClient

_EPILOG = """Examples:

kvrelay drain p0

kvrelay drain p0 --no-wait --router host-a:7070 --router host-b:7070

NODE is an id that `kvrelay status` shows. The node takes nothing new, finishes what it holds, hands back what
is left when its drain_timeout_s is over, and ends, as with SIGTERM. Its answers go on elsewhere, token for
token."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("drain", epilog=_EPILOG)(drain)


def drain(
    node_id: Annotated[str, typer.Argument(metavar="NODE", help="The node's id.")],
    routers: RouterAddresses = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it has left.")] = True,
) -> None:
    """Have a prefill or decode node finish what it holds and leave."""
    asyncio.run(_drain(list(routers or [DEFAULT_ROUTER]), node_id, wait))


async def _drain(addresses: list[str], node_id: str, wait: bool) -> None:
    from kvrelay.client import AsyncClient

    async with AsyncClient(addresses) as client:
        await client.drain_node(node_id)
        if wait:
            print(f"{node_id} drains", flush=True)
            await _until_gone(client, node_id)
    print(f"{node_id} has left" if wait else f"{node_id} has been told to leave")


async def _until_gone(client: AsyncClient, node_id: str) -> None:
    async with aclosing(client.watch_cluster()) as states:
        async for state in states:
            if all(node.node_id != node_id for node in state.nodes):
                return
