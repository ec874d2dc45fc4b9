"""`kvrelay prefill` and `kvrelay decode`: the same options for both roles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Final, cast

import typer

from kvrelay.cli.node_options import (
    DrainTimeout,
    Dtype,
    EngineName,
    KVBytes,
    MaxModelLen,
    MaxNumSeqs,
    Model,
    NodeName,
    NumBlocks,
    ServedName,
    Threads,
    TransferHost,
    TransferPort,
    Transport,
)
from kvrelay.cli.options import EVERY_SETTING, WITH_SETTINGS, ConfigFile, LogLevel, ReadyFile, RouterAddresses

_PURPOSE: Final = {
    "prefill": "Run a prefill node: it computes prompts and pushes their KV to decode nodes.",
    "decode": "Run a decode node: it receives prompts' KV and generates the tokens.",
}
_DETAILS: Final = (
    "Attaches to every router that is named, and again whenever one comes back. On SIGTERM or Ctrl-C it"
    " finishes what it holds, or hands it back after --drain-timeout; a second one ends it at once."
)
_SECTIONS: Final = ("engine", "transfer", "node")
_EPILOG: Final = """{every_setting}

Examples:

kvrelay {role}

kvrelay {role} --router host-a:7070 --model /models/llama-3.1-8b

kvrelay {role} --config {role}.toml --max-num-batched-tokens 1024"""


def register(app: typer.Typer) -> None:
    """Add both commands to `app`."""
    for role in _PURPOSE:
        help_text = f"{_PURPOSE[role]}\n\n{_DETAILS}"
        every_setting = EVERY_SETTING.format(flag="progress-timeout-s 5")
        epilog = _EPILOG.format(role=role, every_setting=every_setting)
        command = app.command(role, help=help_text, epilog=epilog, context_settings=WITH_SETTINGS)
        command(_command_for(role))


def _command_for(role: str) -> Callable[..., None]:
    def run(
        context: typer.Context,
        config: ConfigFile = None,
        routers: RouterAddresses = None,
        node_id: NodeName = None,
        model: Model = None,
        engine: EngineName = None,
        served_name: ServedName = None,
        dtype: Dtype = None,
        threads: Threads = None,
        kv_bytes: KVBytes = None,
        num_blocks: NumBlocks = None,
        max_num_seqs: MaxNumSeqs = None,
        max_model_len: MaxModelLen = None,
        transport: Transport = None,
        transfer_host: TransferHost = None,
        transfer_port: TransferPort = None,
        drain_timeout_s: DrainTimeout = None,
        ready_file: ReadyFile = None,
        log_level: LogLevel = None,
    ) -> None:
        from kvrelay.cli.config_file import load_config
        from kvrelay.cli.setting_flags import overrides_of

        flags: dict[str, tuple[str, object]] = {
            "node.routers": ("--router", list(routers) if routers else None),
            "node.node_id": ("--node-id", node_id),
            "node.drain_timeout_s": ("--drain-timeout", drain_timeout_s),
            "node.ready_file": ("--ready-file", ready_file),
            "node.log_level": ("--log-level", log_level),
            "engine.model": ("--model", model),
            "engine.engine": ("--engine", engine),
            "engine.served_name": ("--served-name", served_name),
            "engine.dtype": ("--dtype", dtype),
            "engine.num_threads": ("--threads", threads),
            "engine.kv_bytes": ("--kv-bytes", kv_bytes),
            "engine.num_blocks": ("--num-blocks", num_blocks),
            "engine.max_num_seqs": ("--max-num-seqs", max_num_seqs),
            "engine.max_model_len": ("--max-model-len", max_model_len),
            "transfer.transport": ("--transport", transport),
            "transfer.listen_host": ("--transfer-host", transfer_host),
            "transfer.listen_port": ("--transfer-port", transfer_port),
        }
        loaded = load_config(config, overrides_of(flags, context.args, _SECTIONS), _SECTIONS, role)
        raise typer.Exit(_run_node(role, loaded.built["node"]))

    return run


def _run_node(role: str, built: object) -> int:
    """Imports torch, so only once the configuration is known to be sound."""
    from kvrelay.cli.embedded_choice import with_embedded_model
    from kvrelay.node.config import NodeConfig

    config = cast(NodeConfig, built)
    config = replace(config, engine=with_embedded_model(config.engine, _print_progress))
    if role == "prefill":
        from kvrelay.prefill_node.main import run_prefill_node

        return run_prefill_node(config)
    from kvrelay.decode_node.main import run_decode_node

    return run_decode_node(config)


def _print_progress(fraction: float, text: str) -> None:
    from kvrelay.node.load_progress import STALLED_LOAD_S
    from kvrelay.node.sd_notify import Notifier

    Notifier.from_environment().extend(f"preparing the model: {fraction:4.0%} {text}", STALLED_LOAD_S)
    print(f"{fraction:4.0%} {text}", file=sys.stderr, flush=True)
