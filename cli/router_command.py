"""`kvrelay router`."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from kvrelay.cli.options import EVERY_SETTING, WITH_SETTINGS, ConfigFile, LogLevel, ReadyFile

_EPILOG = f"""{EVERY_SETTING.format(flag="queue-timeout-s 5")}

Examples:

kvrelay router

kvrelay router --host 10.0.0.1 --port 7070 --http-port 7071

kvrelay router --config router.toml --queue-timeout-s 5"""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("router", epilog=_EPILOG, context_settings=WITH_SETTINGS)(router)


def router(
    context: typer.Context,
    config: ConfigFile = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="HOST", help="Address to listen on. Default: 0.0.0.0.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", "-p", metavar="PORT", help="gRPC port, 0 for any free one. Default: 7070."),
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(
            "--http-port",
            metavar="PORT",
            help="HTTP port for /metrics, /health, /ready and /status, 0 for any free one. Default: 7071.",
        ),
    ] = None,
    router_id: Annotated[
        str | None, typer.Option("--router-id", metavar="NAME", help="How this router is called in status.")
    ] = None,
    ready_file: ReadyFile = None,
    log_level: LogLevel = None,
) -> None:
    """Run a router: clients ask it, and nodes attach to it.

    Needs no GPU and no model. Runs until SIGTERM or Ctrl-C, then lets running requests finish.
    """
    from kvrelay.cli.config_file import load_config
    from kvrelay.cli.setting_flags import overrides_of

    flags = {
        "router.listen_host": ("--host", host),
        "router.grpc_port": ("--port", port),
        "router.http_port": ("--http-port", http_port),
        "router.router_id": ("--router-id", router_id),
        "router.ready_file": ("--ready-file", ready_file),
        "router.log_level": ("--log-level", log_level),
    }
    loaded = load_config(config, overrides_of(flags, context.args, ("router",)), ("router",))
    from kvrelay.router.main import run_router
    from kvrelay.router.server_config import RouterConfig

    raise typer.Exit(run_router(cast(RouterConfig, loaded.built["router"])))
