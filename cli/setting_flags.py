"""Every setting of a config file is a flag too: ``--queue-timeout-s 5`` sets ``router.core.queue_timeout_s``.

A flag may name as much of the dotted key as makes it unique: ``--connect-timeout-s`` would be ambiguous on
a node, ``--transfer-connect-timeout-s`` and ``--transfer.connect_timeout_s`` are not. The flags that a
command's help lists come first; these are looked up only in what is left over.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Union, get_args, get_origin

from kvrelay.cli.config_file import SECTIONS, Override, Overrides
from kvrelay.cli.config_schema import setting_types
from kvrelay.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Setting:
    """A leaf of the config file. `annotation` is its Python type."""

    key: str
    annotation: object

    @property
    def accepts_text(self) -> bool:
        is_union = get_origin(self.annotation) in (Union, UnionType)
        return self.annotation is str or (is_union and str in get_args(self.annotation))

    @property
    def is_switch(self) -> bool:
        return self.annotation is bool

    def flags(self) -> list[str]:
        """All names that may stand for it, the shortest first, without dashes in front."""
        parts = self.key.split(".")
        return ["-".join(parts[start:]).replace("_", "-") for start in range(len(parts) - 1, -1, -1)]


def overrides_of(
    flags: Mapping[str, tuple[str, object]], arguments: Sequence[str], sections: Sequence[str]
) -> Overrides:
    """Overrides by dotted key: those of `flags` (key -> flag, value) that are not None, and of what other
    `arguments` a command was given.

    Raises:
        InvalidRequest: an argument is no setting of `sections`, is ambiguous, or lacks its value.
    """
    overrides = {key: Override(flag, value) for key, (flag, value) in flags.items() if value is not None}
    if arguments:
        settings = list(settings_of(sections))
        for flag, key, value in _read_arguments(list(arguments), settings):
            overrides[key] = Override(flag, value)
    return overrides


def settings_of(sections: Sequence[str]) -> Iterator[Setting]:
    """All leaves of `sections`, in the order of their dataclasses."""
    for name in sections:
        section = SECTIONS[name]
        for path, annotation in setting_types(section.load_type(), section.set_by_command):
            yield Setting(".".join((name, *path)), annotation)


def _read_arguments(arguments: list[str], settings: Sequence[Setting]) -> Iterator[tuple[str, str, object]]:
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or len(argument) < 3:
            raise InvalidRequest(f"unexpected argument {argument!r}", field=argument)
        flag, equals, text = argument.partition("=")
        setting, negated = _find(flag, settings)
        if setting.is_switch and not equals:
            yield flag, setting.key, not negated
            continue
        if negated:
            raise InvalidRequest(f"{flag} takes no value", field=flag)
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise InvalidRequest(f"{flag} needs a value", field=flag)
            text = arguments.pop(0)
        yield flag, setting.key, parse_value(setting, text)


def _find(flag: str, settings: Sequence[Setting]) -> tuple[Setting, bool]:
    """The one setting that `flag` names, and whether it is the ``--no-`` form of a switch."""
    wanted = flag[2:].replace("_", "-").replace(".", "-").lower()
    found = [setting for setting in settings if wanted in setting.flags()]
    if len(found) == 1:
        return found[0], False
    if not found and wanted.startswith("no-"):
        switches = [setting for setting in settings if setting.is_switch and wanted[3:] in setting.flags()]
        if len(switches) == 1:
            return switches[0], True
    if found:
        raise InvalidRequest(
            f"{flag} is ambiguous: " + " or ".join(f"--{setting.flags()[-1]}" for setting in found),
            field=flag,
        )
    known = [name for setting in settings for name in setting.flags()]
    close = get_close_matches(wanted, known, n=1, cutoff=0.6)
    hint = f"; did you mean --{close[0]}?" if close else "; --help lists the options"
    raise InvalidRequest(f"no such option {flag}{hint}", field=flag)


def parse_value(setting: Setting, text: str) -> object:
    """`text` as that setting's type would stand in TOML; left as text where it can't be read so."""
    if setting.accepts_text:
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    # A text of several lines could smuggle in more keys than the one.
    return parsed["value"] if len(parsed) == 1 else text


def as_argument(key: str, value: object) -> str:
    """The flag that gives another process the same setting: ``--engine.num_blocks=256``."""
    if isinstance(value, bool):
        return f"--{key}={str(value).lower()}"
    if isinstance(value, list):
        quoted = ", ".join(f'"{entry}"' if isinstance(entry, str) else repr(entry) for entry in value)
        return f"--{key}=[{quoted}]"
    return f"--{key}={value}"
