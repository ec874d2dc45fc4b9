"""Config files: which sections there are, what builds each, and where a fault's value came from.

One file may configure a whole cluster: a router reads `[router]`, a node `[node]`, `[engine]` and
`[transfer]`, a proxy `[proxy]`, `kvrelay up` also `[cluster]`. A file is always checked as a whole, whoever
reads it. Values from the command line lie over the file's; a fault names the line or the flag that the
value came from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, cast

from kvrelay.cli.config_schema import Built, KeyFault, build, nearest, show_value
from kvrelay.cli.faults import Fault, FaultyConfigError
from kvrelay.cli.toml_source import TomlSource, parse_toml
from kvrelay.core.node_messages import Role

MAX_FILE_BYTES: Final = 256 * 1024
DEFAULT_MODEL: Final = "smollm2"
SIM_MODEL: Final = "sim"


@dataclass(frozen=True, slots=True)
class Section:
    """A table of the file. `type_name` in `module` is the dataclass that it becomes."""

    module: str
    type_name: str
    meaning: str
    set_by_command: tuple[str, ...] = ()
    """Fields that are no settings: the command sets them."""

    def load_type(self) -> type:
        """Import the dataclass."""
        return cast(type, getattr(import_module(self.module), self.type_name))


SECTIONS: Final[Mapping[str, Section]] = {
    "router": Section("kvrelay.router.server_config", "RouterConfig", "a router"),
    "engine": Section("kvrelay.engine.config", "EngineConfig", "a node's engine"),
    "transfer": Section("kvrelay.kv_transfer.config", "KVTransferConfig", "a node's KV transfer"),
    "node": Section(
        "kvrelay.node.config", "NodeConfig", "a prefill or decode node", ("role", "engine", "transfer")
    ),
    "proxy": Section("kvrelay.openai_proxy.config", "ProxyConfig", "an OpenAI proxy"),
    "cluster": Section("kvrelay.cli.config", "ClusterConfig", "kvrelay up"),
}


@dataclass(frozen=True, slots=True)
class Override:
    """A value from the command line, and the flag that it was given by."""

    flag: str
    value: object


Overrides = Mapping[str, Override]
"""By dotted key."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """Sound settings. `given` holds the values that file and flags gave, `built` each section's dataclass."""

    file: str
    given: Mapping[str, object]
    built: Mapping[str, object]


def load_config(
    file: Path | None,
    overrides: Overrides,
    needed: Sequence[str],
    role: str = "prefill",
) -> LoadedConfig:
    """Read `file`, lay `overrides` over it, and build the sections that are given or `needed`.

    Raises:
        FaultyConfigError: with all faults, each with its line or flag.
    """
    source = read_source(file) if file else TomlSource({}, {})
    document = copy.deepcopy(source.document)
    faults = list(source.faults)
    faults.extend(_apply(overrides, document))
    given = copy.deepcopy(document)
    _choose_model(document, needed)
    built: dict[str, object] = {}
    found = _unknown_sections(document)
    for name in SECTIONS:
        if name in document or name in needed:
            section = _build_section(name, document.get(name, {}), built, role)
            built[name] = section.value
            found.extend(section.faults)
    faults.extend(_located(fault, source, overrides) for fault in found)
    if faults:
        raise FaultyConfigError(str(file) if file else "", faults)
    return LoadedConfig(str(file) if file else "", given, built)


def read_source(file: Path) -> TomlSource:
    """Read and parse a file.

    Raises:
        FaultyConfigError: it can't be read at all.
    """
    try:
        if not file.is_file():
            problem = "is not a file" if file.exists() else "does not exist"
            raise FaultyConfigError(str(file), [Fault(problem)])
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FaultyConfigError(str(file), [Fault(f"can't be read: {error.strerror or error}")]) from error
    except ValueError as error:
        raise FaultyConfigError(repr(str(file)), [Fault(f"is no usable path: {error}")]) from error
    if len(data) > MAX_FILE_BYTES:
        raise FaultyConfigError(str(file), [Fault(f"is larger than {MAX_FILE_BYTES} bytes")])
    try:
        return parse_toml(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = Fault("is not UTF-8 text", line=line, hint="save the file as UTF-8")
        raise FaultyConfigError(str(file), [fault]) from error


def _apply(overrides: Overrides, document: dict[str, object]) -> list[Fault]:
    """Lay `overrides` over `document`; returns what is in their way."""
    faults = []
    for key, override in overrides.items():
        path = tuple(key.split("."))
        table: object = document
        for depth, name in enumerate(path[:-1], 1):
            table = table.setdefault(name, {}) if isinstance(table, dict) else None
            if not isinstance(table, dict):
                where = ".".join(path[:depth])
                faults.append(Fault("must be a table", key=where, flag=override.flag))
                break
        else:
            cast("dict[str, object]", table)[path[-1]] = override.value
    return faults


def _choose_model(document: dict[str, object], needed: Sequence[str]) -> None:
    """Fill in what `[engine]` may leave open: the embedded model, and ``sim`` as a model's name."""
    engine = document.setdefault("engine", {}) if "engine" in needed else document.get("engine")
    if not isinstance(engine, dict):
        return
    if engine.get("model") == SIM_MODEL:
        engine.setdefault("engine", SIM_MODEL)
    engine.setdefault("model", SIM_MODEL if engine.get("engine") == SIM_MODEL else DEFAULT_MODEL)


def _unknown_sections(document: Mapping[str, object]) -> list[KeyFault]:
    return [
        KeyFault((name,), "is not a section", nearest(name, SECTIONS, ()))
        for name in document
        if name not in SECTIONS
    ]


def _build_section(name: str, table: object, built: Mapping[str, object], role: str) -> Built:
    if not isinstance(table, Mapping):
        fault = KeyFault(
            (name,), f"must be a table, got {show_value(table)}", f"write [{name}] on a line of its own"
        )
        return Built(None, (fault,))
    section_type = SECTIONS[name].load_type()
    # [node] is judged beside a faulty or absent [engine] too; what is then built is thrown away.
    available = {"role": Role(role), **built}
    fixed = {field: available.get(field) for field in SECTIONS[name].set_by_command}
    return build(section_type, table, (name,), fixed=fixed)


def _located(fault: KeyFault, source: TomlSource, overrides: Overrides) -> Fault:
    key = ".".join(fault.path)
    override = overrides.get(key)
    return Fault(
        message=fault.message,
        key=key,
        line=None if override else source.line_of(fault.path),
        hint=fault.hint,
        flag=override.flag if override else "",
    )
