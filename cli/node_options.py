"""Options of the node commands, grouped as `--help` shows them."""

from __future__ import annotations

from typing import Annotated, Final

import typer

_MODEL: Final = "Model"
_TRANSFER: Final = "KV transfer"

NodeName = Annotated[
    str | None,
    typer.Option("--node-id", metavar="NAME", help="Unique name. Default: of role, host and pid."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A Hugging Face folder, smollm2 (embedded) or sim (no model). Default: smollm2.",
        rich_help_panel=_MODEL,
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", metavar="ENGINE", help="torch or sim.", rich_help_panel=_MODEL),
]
ServedName = Annotated[
    str | None,
    typer.Option(
        "--served-name",
        metavar="NAME",
        help="What clients call the model. Default: the folder's name.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32 or bfloat16. Default: float32.",
        rich_help_panel=_MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="CPU threads to compute with. Default: torch's choice.",
        rich_help_panel=_MODEL,
    ),
]
KVBytes = Annotated[
    int | None,
    typer.Option(
        "--kv-bytes",
        metavar="BYTES",
        help="Memory for KV. Default: 1 GiB.",
        rich_help_panel=_MODEL,
    ),
]
NumBlocks = Annotated[
    int | None,
    typer.Option(
        "--num-blocks",
        metavar="N",
        help="KV blocks, instead of --kv-bytes.",
        rich_help_panel=_MODEL,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs",
        metavar="N",
        help="Sequences computed at once. Default: 64.",
        rich_help_panel=_MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        metavar="TOKENS",
        help="Longest prompt plus output. Default: the model's.",
        rich_help_panel=_MODEL,
    ),
]
Transport = Annotated[
    str | None,
    typer.Option(
        "--transport",
        metavar="KIND",
        help="auto, ucx or tcp. Default: auto.",
        rich_help_panel=_TRANSFER,
    ),
]
TransferHost = Annotated[
    str | None,
    typer.Option(
        "--transfer-host",
        metavar="HOST",
        help="Address that KV is received on and that peers dial. Default: this host's, on the way to its"
        " routers.",
        rich_help_panel=_TRANSFER,
    ),
]
TransferPort = Annotated[
    int | None,
    typer.Option(
        "--transfer-port",
        metavar="PORT",
        help="Port for KV transfer. Default: any free one.",
        rich_help_panel=_TRANSFER,
    ),
]
DrainTimeout = Annotated[
    float | None,
    typer.Option("--drain-timeout", metavar="SECONDS", help="Time to finish after SIGTERM. Default: 30."),
]
