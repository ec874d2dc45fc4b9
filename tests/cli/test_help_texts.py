"""Help: every command has it, says what its options mean, and costs no heavy import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

COMMANDS = {
    (): [
        *[
            "up",
            "router",
            "prefill",
            "decode",
            "proxy",
            "keys",
            "generate",
            "status",
            "explain",
            "drain",
            "config",
        ],
        "Exit status",
    ],
    ("up",): [
        "--prefill",
        "--decode",
        "--model",
        "--threads",
        "--once",
        "--port",
        "Default: 7070",
        "Examples",
    ],
    ("router",): ["--config", "--port", "--http-port", "--ready-file", "Default: 7070", "Examples"],
    ("prefill",): ["--router", "--model", "--dtype", "--transport", "--transfer-host", "Examples", "SIGTERM"],
    ("decode",): ["--router", "--model", "--kv-bytes", "--num-blocks", "KV transfer", "Examples"],
    ("generate",): ["--raw", "--system", "--seed", "--top-p", "--stop-token-id", "--json", "Exit status"],
    ("status",): ["--watch", "--json", "--router", "Examples"],
    ("drain",): ["NODE", "--router", "--no-wait", "SIGTERM", "drain_timeout_s", "Examples"],
    ("explain",): ["ID", "--json", "--router", "x-request-id", "num_remembered_decisions", "Examples"],
    ("proxy",): [
        "OpenAI",
        "--router",
        "--port",
        "Default: 8000",
        "--workers",
        "--keys-file",
        "--ready-file",
        "--request-timeout-s",
        "SIGTERM",
        "Examples",
    ],
    ("keys",): ["add", "list"],
    ("keys", "add"): ["FILE", "NAME", "--max-concurrent", "--tokens-per-minute", "--private-cache", "once"],
    ("keys", "list"): ["FILE", "limits"],
    ("config",): ["check"],
    ("config", "check"): ["FILE", "--json", "Exit status"],
}


@pytest.mark.parametrize(("command", "texts"), COMMANDS.items(), ids=lambda value: " ".join(value)[:20])
def test_help_of_a_command_says_what_it_takes(
    command: tuple[str, ...], texts: list[str], invoke: Any
) -> None:
    outcome = invoke(*command, "--help")
    assert outcome.code == 0
    for text in texts:
        assert text in outcome.out


def test_no_command_is_listed_that_does_not_exist_yet(invoke: Any) -> None:
    words = invoke("--help").out.split()
    assert "bench" not in words


def test_version(invoke: Any) -> None:
    from kvrelay import __version__

    assert invoke("--version").out == f"kvrelay {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"torch", "numpy", "grpc", "pydantic", "tokenizers", "transformers"}),
        (["router", "--port", "x"], {"torch", "numpy", "tokenizers", "transformers"}),
        (["router", "--grpc-port", "70000"], {"torch", "transformers", "nixl_cu13"}),
        (
            ["generate", "--router", "127.0.0.1:1", "--timeout", "0.2", "hi"],
            {"torch", "numpy", "transformers"},
        ),
        (["explain", "-r", "127.0.0.1:1", "x"], {"torch", "numpy", "transformers", "fastapi"}),
        (["prefill", "--num-blocks", "0"], {"torch", "transformers", "nixl_cu13"}),
        (["proxy", "--port", "70000"], {"torch", "numpy", "transformers", "fastapi", "uvicorn"}),
        (
            ["keys", "list", "/nowhere"],
            {"torch", "numpy", "transformers", "fastapi", "uvicorn", "tokenizers"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_no_more_than_it_needs(arguments: list[str], unwanted: set[str]) -> None:
    code = (
        "import sys, atexit\n"
        "from kvrelay.cli.main import main\n"
        "atexit.register(lambda: print('\\nLOADED', *sys.modules))\n"
        "sys.argv = ['kvrelay', *sys.argv[1:]]\n"
        "main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    loaded = set(run.stdout.rpartition("LOADED")[2].split())
    assert "kvrelay.cli.main" in loaded
    assert not unwanted & loaded
