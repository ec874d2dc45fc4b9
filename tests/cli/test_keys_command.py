"""`kvrelay keys`: a key is printed once, and kept as a hash in a file that only its owner reads."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from kvrelay.openai_proxy.access import hash_key, read_keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_add_prints_the_key_alone_and_keeps_its_hash(invoke: Any, file: Path) -> None:
    outcome = invoke("keys", "add", str(file), "ada", "--max-concurrent", "3")
    assert outcome.code == 0
    (text,) = outcome.out.splitlines()
    assert text.startswith("kvr-")
    assert "restart" in outcome.err
    assert text not in outcome.err + file.read_text()
    (key,) = read_keys(file)
    assert (key.name, key.sha256, key.max_concurrent) == ("ada", hash_key(text), 3)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_list_shows_names_and_limits_in_order(invoke: Any, file: Path) -> None:
    invoke(
        "keys",
        "add",
        str(file),
        "ada",
        "--max-concurrent",
        "3",
        "--tokens-per-minute",
        "9",
        "--private-cache",
    )
    invoke("keys", "add", str(file), "bob")
    outcome = invoke("keys", "list", str(file))
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "ada: at most 3 at once, 9 tokens a minute, its own cache",
        "bob: no limits",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ada"], "has a key 'ada' already"),
        (["a b"], "name must match"),
        (["bob", "--max-concurrent", "-1"], "max_concurrent must be"),
    ],
)
def test_what_can_not_be_added_leaves_the_file_as_it_was(
    invoke: Any, file: Path, arguments: list[str], message: str
) -> None:
    invoke("keys", "add", str(file), "ada")
    before = file.read_bytes()
    outcome = invoke("keys", "add", str(file), *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message in outcome.err
    assert file.read_bytes() == before


def test_a_file_that_is_no_keys_file_is_left_alone(invoke: Any, file: Path) -> None:
    file.write_text("[router]\n")
    outcome = invoke("keys", "add", str(file), "ada")
    assert outcome.code == 2
    assert "'router' is not known" in outcome.err
    assert file.read_text() == "[router]\n"


@pytest.mark.parametrize("command", [["list"], ["add"]])
def test_a_file_that_can_not_be_had_is_a_clear_error(invoke: Any, tmp_path: Path, command: list[str]) -> None:
    missing = str(tmp_path / "no folder" / "keys.toml")
    outcome = invoke("keys", *command, missing, *(["ada"] if command == ["add"] else []))
    assert outcome.code == 2
    assert "No such file" in outcome.err
    assert "Traceback" not in outcome.err
