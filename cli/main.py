"""`kvrelay`: the commands, and what the exit status says."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvrelay import __version__
from kvrelay.cli import (
    config_command,
    drain_command,
    explain_command,
    generate_command,
    keys_command,
    node_commands,
    proxy_command,
    router_command,
    simulate_command,
    status_command,
    up_command,
)
from kvrelay.cli.exit_codes import describe_error, exit_code_of
from kvrelay.core.errors import KVRelayError
from kvrelay.node.parent_death import die_with_parent

EXIT_STATUS_TEXT = (
    "Exit status: 0 done; 1 failed; 2 bad usage, request or config;"
    " 3 no router, no node or no room; 130 Ctrl-C."
)

app = typer.Typer(
    name="kvrelay",
    help="Serve a large language model with prefill and decode on different machines.",
    epilog=EXIT_STATUS_TEXT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvrelay {__version__}")
        raise typer.Exit


@app.callback()
def _kvrelay(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve a large language model with prefill and decode on different machines."""


up_command.register(app)
router_command.register(app)
node_commands.register(app)
proxy_command.register(app)
keys_command.register(app)
generate_command.register(app)
status_command.register(app)
explain_command.register(app)
drain_command.register(app)
config_command.register(app)
simulate_command.register(app)


def main() -> None:
    """Run the command line; ends the process. Foreseen errors are one readable line, bugs a traceback."""
    die_with_parent()
    try:
        app()
    except KVRelayError as error:
        print(describe_error(error), file=sys.stderr)
        sys.exit(exit_code_of(error))
