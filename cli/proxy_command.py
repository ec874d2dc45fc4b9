"""`kvrelay proxy`."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from kvrelay.cli.options import EVERY_SETTING, WITH_SETTINGS, ConfigFile, LogLevel, ReadyFile, RouterAddresses

_EPILOG = f"""{EVERY_SETTING.format(flag="request-timeout-s 120")}

Examples:

kvrelay proxy

kvrelay proxy --router host-a:7070 --router host-b:7070 --workers 4 --keys-file keys.toml

kvrelay proxy --config proxy.toml --port 8080"""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("proxy", epilog=_EPILOG, context_settings=WITH_SETTINGS)(proxy)


def proxy(
    context: typer.Context,
    config: ConfigFile = None,
    routers: RouterAddresses = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="HOST", help="Address to listen on. Default: 0.0.0.0.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", "-p", metavar="PORT", help="HTTP port, 0 for any free one. Default: 8000."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Processes on that port. Default: 1.")
    ] = None,
    keys_file: Annotated[
        str | None,
        typer.Option(
            "--keys-file", metavar="FILE", help="API keys (see `kvrelay keys`). Default: anybody may ask."
        ),
    ] = None,
    ready_file: ReadyFile = None,
    log_level: LogLevel = None,
) -> None:
    """Run an OpenAI proxy: any OpenAI client asks it, and it asks the routers.

    Needs no GPU and no model, and keeps no state: run as many as you like. Runs until SIGTERM or Ctrl-C,
    then lets running requests finish.
    """
    from kvrelay.cli.config_file import load_config
    from kvrelay.cli.setting_flags import overrides_of

    flags: dict[str, tuple[str, object]] = {
        "proxy.routers": ("--router", list(routers) if routers else None),
        "proxy.host": ("--host", host),
        "proxy.port": ("--port", port),
        "proxy.workers": ("--workers", workers),
        "proxy.keys_file": ("--keys-file", keys_file),
        "proxy.ready_file": ("--ready-file", ready_file),
        "proxy.log_level": ("--log-level", log_level),
    }
    loaded = load_config(config, overrides_of(flags, context.args, ("proxy",)), ("proxy",))
    from kvrelay.openai_proxy.config import ProxyConfig
    from kvrelay.openai_proxy.main import run_proxy

    raise typer.Exit(run_proxy(cast(ProxyConfig, loaded.built["proxy"])))
