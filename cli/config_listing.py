"""A sound configuration as text or JSON: which services it configures, and with what. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import cast

from kvrelay.cli.config_file import SECTIONS, LoadedConfig
from kvrelay.cli.config_schema import key_of_field, show_value


@dataclasses.dataclass(frozen=True, slots=True)
class ListedSetting:
    """One setting's effective value; `is_given`: it does not come from the defaults."""

    key: str
    value: object
    is_given: bool


def listing(loaded: LoadedConfig, *, with_defaults: bool) -> list[str]:
    """A headline, then ``key = value`` lines."""
    what = ", ".join(f"{SECTIONS[name].meaning} [{name}]" for name in loaded.built) or "nothing"
    lines = [f"ok: {loaded.file} configures {what}"]
    for name, built in loaded.built.items():
        for setting in _settings(built, loaded.given.get(name), name):
            if setting.is_given or with_defaults:
                default = "" if setting.is_given else "  # default"
                lines.append(f"  {setting.key} = {show_value(setting.value)}{default}")
    return lines


def listing_as_json(loaded: LoadedConfig) -> dict[str, object]:
    """All effective values by section, as nested mappings."""
    root: dict[str, object] = {}
    for name, built in loaded.built.items():
        for setting in _settings(built, None, name):
            *tables, key = setting.key.split(".")
            table = root
            for part in tables:
                table = cast("dict[str, object]", table.setdefault(part, {}))
            table[key] = setting.value
    return root


def _settings(built: object, given: object, prefix: str) -> Iterator[ListedSetting]:
    """All settings of a dataclass, nested ones too, less what a command sets instead of the file."""
    assert dataclasses.is_dataclass(built)
    table = given if isinstance(given, Mapping) else {}
    hidden = SECTIONS[prefix].set_by_command if prefix in SECTIONS else ()
    for spec in dataclasses.fields(built):
        value, key = getattr(built, spec.name), key_of_field(spec.name)
        if spec.name in hidden:
            continue
        if dataclasses.is_dataclass(value):
            yield from _settings(value, table.get(key), f"{prefix}.{key}")
        else:
            yield ListedSetting(f"{prefix}.{key}", _as_toml(value), key in table)


def _as_toml(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
