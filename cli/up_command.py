"""`kvrelay up`: a whole cluster on this machine, until Ctrl-C or for one question."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvrelay.cli.options import EVERY_SETTING, WITH_SETTINGS, ConfigFile

_SECTIONS: Final = ("cluster", "router", "proxy", "engine", "transfer", "node")
_EPILOG: Final = f"""{EVERY_SETTING.format(flag="num-blocks 512")}

Examples:

kvrelay up

kvrelay up --prefill 2 --decode 2 --model /models/qwen3-0.6b --dtype bfloat16

kvrelay up --once "Why is the sky blue?"

kvrelay up --model sim --port 0"""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("up", epilog=_EPILOG, context_settings=WITH_SETTINGS)(up)


def up(
    context: typer.Context,
    config: ConfigFile = None,
    prefill: Annotated[
        int | None, typer.Option("--prefill", metavar="N", help="Prefill nodes. Default: 1.")
    ] = None,
    decode: Annotated[
        int | None, typer.Option("--decode", metavar="N", help="Decode nodes. Default: 1.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A Hugging Face folder, smollm2 (embedded) or sim (no model). Default: smollm2.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="float32 or bfloat16. Default: float32.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", "-p", metavar="PORT", help="Router's gRPC port, 0 for any. Default: 7070."),
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(
            "--http-port",
            metavar="PORT",
            help="Router's HTTP port, 0 for any. Default: 7071.",
        ),
    ] = None,
    proxy_port: Annotated[
        int | None,
        typer.Option("--proxy-port", metavar="PORT", help="OpenAI proxy's port, 0 for any. Default: 8000."),
    ] = None,
    proxy: Annotated[
        bool | None,
        typer.Option("--proxy/--no-proxy", help="Start an OpenAI proxy, too. Default: yes, but for --once."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            help="CPU threads of each node. Default: its share of the cores.",
        ),
    ] = None,
    log_dir: Annotated[
        str | None,
        typer.Option("--log-dir", metavar="DIR", help="Where the services log. Default: a temporary folder."),
    ] = None,
    keep_logs: Annotated[
        bool, typer.Option("--keep-logs", help="Keep the temporary log folder after a clean end, too.")
    ] = False,
    once: Annotated[
        str | None,
        typer.Option("--once", metavar="PROMPT", help="Ask this, show how it was served, and stop."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Longest answer to --once.")
    ] = 200,
) -> None:
    """Start a router, prefill and decode nodes and an OpenAI proxy here, each its own process.

    Stops all of them on Ctrl-C or SIGTERM, and when one of them dies. With --once, ports are free ones
    unless they are given.
    """
    from kvrelay.cli.setting_flags import overrides_of
    from kvrelay.cli.up_task import prepare_up, run_up

    flags: dict[str, tuple[str, object]] = {
        "cluster.prefill": ("--prefill", prefill),
        "cluster.decode": ("--decode", decode),
        "engine.model": ("--model", model),
        "engine.dtype": ("--dtype", dtype),
        "router.grpc_port": ("--port", port),
        "router.http_port": ("--http-port", 0 if http_port is None and port == 0 else http_port),
        "proxy.port": ("--proxy-port", 0 if proxy_port is None and port == 0 else proxy_port),
        "cluster.proxy": ("--proxy", False if proxy is None and once is not None else proxy),
        "engine.num_threads": ("--threads", threads),
        "cluster.log_dir": ("--log-dir", log_dir),
    }
    overrides = overrides_of(flags, context.args, _SECTIONS)
    task = prepare_up(config, overrides, once, max_tokens, keep_logs)
    raise typer.Exit(run_up(task))
