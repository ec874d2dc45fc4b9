"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

DEFAULT_ROUTER: Final = "127.0.0.1:7070"
EVERY_SETTING: Final = (
    "Every setting of the config file is a flag too, as in --{flag}; deploy/examples lists them."
)
WITH_SETTINGS: Final = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of commands that take every setting as a flag (see `setting_flags`)."""

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        envvar="KVRELAY_CONFIG",
        help="Settings in TOML; flags override them. `kvrelay config check FILE` checks one.",
    ),
]
ReadyFile = Annotated[
    str | None,
    typer.Option("--ready-file", metavar="FILE", help="Write pid and addresses there, as JSON, when ready."),
]
LogLevel = Annotated[
    str | None,
    typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error. Logs go to stderr."),
]
RouterAddresses = Annotated[
    list[str] | None,
    typer.Option(
        "--router",
        "-r",
        metavar="HOST:PORT",
        envvar="KVRELAY_ROUTER",
        help=f"A router; repeat it for several. Default: {DEFAULT_ROUTER}.",
    ),
]
