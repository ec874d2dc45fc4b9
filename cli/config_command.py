"""`kvrelay config check`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvrelay.cli.exit_codes import EXIT_USAGE

if TYPE_CHECKING:
    from kvrelay.cli.faults import FaultyConfigError

_EPILOG: Final = """Examples:

kvrelay config check deploy/examples/router.toml

kvrelay config check --all cluster.toml

Exit status: 0 when the file can be used, 2 when it can't."""


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    group = typer.Typer(help="Check config files.", no_args_is_help=True)
    group.callback()(_config)
    group.command("check", epilog=_EPILOG)(check)
    app.add_typer(group, name="config")


def _config() -> None:
    """Check config files."""


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A config file (TOML).")],
    show_all: Annotated[bool, typer.Option("--all", help="Show defaults too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a config file: all its faults at once, each with its line; starts nothing."""
    from kvrelay.cli.config_file import load_config
    from kvrelay.cli.config_listing import listing, listing_as_json
    from kvrelay.cli.faults import FaultyConfigError

    try:
        loaded = load_config(file, {}, ())
    except FaultyConfigError as error:
        _print_faults(error, as_json)
        raise typer.Exit(EXIT_USAGE) from None
    if as_json:
        print(json.dumps({"ok": True, "file": loaded.file, "sections": listing_as_json(loaded)}))
    else:
        print("\n".join(listing(loaded, with_defaults=show_all)))


def _print_faults(error: FaultyConfigError, as_json: bool) -> None:
    if as_json:
        faults = [
            {"line": fault.line, "key": fault.key, "message": fault.message, "hint": fault.hint}
            for fault in error.faults
        ]
        print(json.dumps({"ok": False, "file": error.file, "faults": faults}))
        return
    print(error.message, file=sys.stderr)
    count = len(error.faults)
    print(f"{count} fault{'s' if count != 1 else ''}", file=sys.stderr)
