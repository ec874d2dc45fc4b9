"""`kvrelay explain`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.options import DEFAULT_ROUTER, RouterAddresses

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvrelay.core.explanation import Explanation

_EPILOG = """Examples:

kvrelay generate --request-id mine "hi"; kvrelay explain mine

kvrelay explain my-id --router host-a:7070 --router host-b:7070

kvrelay explain my-id --json | jq .decision.candidates

ID is what --request-id or, with the OpenAI API, x-request-id says (its further choices add -1, -2 ...).

A router remembers the requests that it placed last, as many as its num_remembered_decisions."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("explain", epilog=_EPILOG)(explain)


def explain(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="The request's id.")],
    routers: RouterAddresses = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show why a request was placed where it was, and what became of it: predicted against measured."""
    asyncio.run(_explain(list(routers or [DEFAULT_ROUTER]), request_id, as_json))


async def _explain(addresses: list[str], request_id: str, as_json: bool) -> None:
    from kvrelay.client import AsyncClient

    async with AsyncClient(addresses) as client:
        explanation = await client.explain(request_id)
    _print(explanation, as_json)


def _print(explanation: Explanation, as_json: bool) -> None:
    from kvrelay.cli.explanation_view import explanation_as_json, plain_text

    if as_json:
        print(json.dumps(explanation_as_json(explanation)))
    elif sys.stdout.isatty():
        import rich

        rich.print(_rendered(explanation))
    else:
        print(plain_text(explanation))


def _rendered(explanation: Explanation) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from kvrelay.cli.explanation_terms import comparison_rows, meaning_lines
    from kvrelay.cli.explanation_view import candidate_rows, headline, outcome_lines
    from kvrelay.core.node_messages import Role

    tables = []
    for role in Role:
        columns, *rows = candidate_rows(explanation, role)
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    meanings = (Text(line, style="dim") for line in meaning_lines(explanation.decision))
    if rows := comparison_rows(explanation):
        columns, *rows = rows
        compared = Table(*columns)
        for row in rows:
            compared.add_row(*map(Text, row))
        tables.append(compared)
    outcome = map(Text, outcome_lines(explanation))
    return Group(Text(headline(explanation), style="bold"), *tables, *meanings, *outcome)
