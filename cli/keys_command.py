"""`kvrelay keys`: the file of API keys that a proxy reads."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

KeysFile = Annotated[Path, typer.Argument(metavar="FILE", help="The keys file; made if it does not exist.")]


def register(app: typer.Typer) -> None:
    """Add the group of commands to `app`."""
    keys = typer.Typer(no_args_is_help=True, help="Make and list the API keys of an OpenAI proxy.")
    keys.command("add")(add)
    keys.command("list")(list_keys)
    app.add_typer(keys, name="keys")


def add(
    file: KeysFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who gets it; logs call it so.")],
    max_concurrent: Annotated[
        int, typer.Option("--max-concurrent", metavar="N", help="Requests at once. Default: 0, no limit.")
    ] = 0,
    tokens_per_minute: Annotated[
        int,
        typer.Option(
            "--tokens-per-minute", metavar="N", help="Prompt and output together. Default: 0, no limit."
        ),
    ] = 0,
    private_cache: Annotated[
        bool,
        typer.Option(
            "--private-cache", help="Share cached prefixes with no other key, so none can probe it."
        ),
    ] = False,
    max_priority: Annotated[
        str, typer.Option("--max-priority", metavar="CLASS", help="high, normal or low: it gets no more.")
    ] = "high",
) -> None:
    """Make a key, and print it: once, since the file keeps only its hash."""
    from kvrelay.core.errors import InvalidRequest
    from kvrelay.openai_proxy.access import ApiKey, hash_key, key_as_toml, new_key, parse_keys, read_keys

    text = new_key()
    key = ApiKey(name, hash_key(text), max_concurrent, tokens_per_minute, private_cache, max_priority)
    known = read_keys(file) if file.exists() else ()
    if any(other.name == name for other in known):
        raise InvalidRequest(f"{file} has a key {name!r} already", field="NAME")
    parse_keys(key_as_toml(key), str(file))
    _append(file, key_as_toml(key))
    print(text)
    print(f"added {name!r} to {file}; restart the proxy to have it known", file=sys.stderr)


def list_keys(file: KeysFile) -> None:
    """Show the keys' names and limits."""
    from kvrelay.openai_proxy.access import read_keys

    for key in read_keys(file):
        limits = [
            f"at most {key.max_concurrent} at once" if key.max_concurrent else "",
            f"{key.tokens_per_minute} tokens a minute" if key.tokens_per_minute else "",
            "its own cache" if key.private_cache else "",
            f"priority {key.max_priority} at most" if key.max_priority != "high" else "",
        ]
        print(f"{key.name}: {', '.join(filter(None, limits)) or 'no limits'}")


def _append(file: Path, table: str) -> None:
    """Readable by its owner only."""
    from kvrelay.core.errors import ConfigError

    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as stream:
            stream.write(("\n" if stream.tell() else "") + table)
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror or error}", field="FILE") from error
