"""From a table of a config file to a package's frozen dataclass, with every fault found on the way.

The dataclasses are the schema: their fields, types and defaults say what a table may hold, and their own
validation says which values are sound. pydantic checks the types of the raw values; a key that fails is
left out, so that the rest is judged all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    ConfigDict,
    Strict,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from kvrelay.cli.toml_source import KeyPath
from kvrelay.core.errors import KVRelayError

_PLAIN: Final[dict[object, tuple[object, str]]] = {
    bool: (StrictBool, "true or false"),
    int: (StrictInt, "an integer"),
    float: (StrictFloat | StrictInt, "a number"),
    str: (StrictStr, "a string"),
    Path: (StrictStr, "a path (a string)"),
}

_KEY_OF_FIELD: Final = {"sim_timing": "sim"}


@dataclass(frozen=True, slots=True)
class KeyFault:
    """A fault before it is known where the value came from. `path` is from the document's root."""

    path: KeyPath
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Built:
    """The dataclass, or None where no sound one could be built."""

    value: Any
    faults: tuple[KeyFault, ...] = ()


def build(
    dataclass_type: type,
    table: Mapping[str, object],
    path: KeyPath,
    *,
    fixed: Mapping[str, object] | None = None,
) -> Built:
    """Build `dataclass_type` from `table`, which stands at `path`; nested dataclasses are nested tables.

    `fixed` gives fields that are no settings: the caller sets them.
    """
    fixed = fixed or {}
    settings = [spec for spec in fields(dataclass_type) if spec.init and spec.name not in fixed]
    hints = get_type_hints(dataclass_type)
    faults = _unknown_keys(table, [key_of_field(spec.name) for spec in settings], path)
    values: dict[str, object] = {}
    for spec in settings:
        key = key_of_field(spec.name)
        if key in table:
            read = _read_value(hints[spec.name], table[key], (*path, key))
            faults.extend(read.faults)
            if not read.faults:
                values[spec.name] = read.value
        elif _is_required(spec):
            faults.append(KeyFault((*path, key), "is required", f"it is {describe_type(hints[spec.name])}"))
    if any(_is_required(spec) and spec.name not in values for spec in settings):
        return Built(None, tuple(faults))
    return _construct(dataclass_type, {**values, **fixed}, path, faults)


def setting_types(dataclass_type: type, excluded: Iterable[str] = ()) -> Iterator[tuple[KeyPath, object]]:
    """Path and type annotation of every setting that is no table, in order; `excluded` fields are none."""
    hints = get_type_hints(dataclass_type)
    for spec in fields(dataclass_type):
        if not spec.init or spec.name in excluded:
            continue
        path = (key_of_field(spec.name),)
        nested = _nested_dataclass(hints[spec.name])
        if nested is None:
            yield path, hints[spec.name]
        else:
            yield from (((*path, *inner), annotation) for inner, annotation in setting_types(nested))


def key_of_field(name: str) -> str:
    """What a dataclass's field is called in a file."""
    return _KEY_OF_FIELD.get(name, name)


def describe_type(annotation: object) -> str:
    """``an integer``, ``one of "tcp", "ucx"``: what a value of that type looks like."""
    if annotation in _PLAIN:
        return _PLAIN[annotation][1]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(show_value(member.value) for member in annotation)
    if is_dataclass(annotation):
        return "a table"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(show_value(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(part) for part in arguments if part is not NoneType)
    if origin in (tuple, list):
        return "a list, each entry " + describe_type(arguments[0]) if arguments else "a list"
    return "a value"


def show_value(value: object) -> str:
    """`value` as it would stand in TOML, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value[:40]}…"' if len(value) > 40 else f'"{value}"'
    if isinstance(value, Mapping):
        return "a table"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _is_required(spec: Field[Any]) -> bool:
    return spec.default is MISSING and spec.default_factory is MISSING


def _unknown_keys(table: Mapping[str, object], known: Iterable[str], path: KeyPath) -> list[KeyFault]:
    return [
        KeyFault((*path, name), "is not a setting", nearest(name, known, path))
        for name in table
        if name not in set(known)
    ]


def nearest(name: str, known: Iterable[str], path: KeyPath) -> str:
    """A hint: the known name most like `name`, or all of them when none is."""
    names = sorted(known)
    close = get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {'.'.join((*path, close[0]))}?"
    where = f"[{'.'.join(path)}]" if path else "a file"
    return f"{where} takes {', '.join(names)}"


def _read_value(annotation: object, value: object, path: KeyPath) -> Built:
    nested = _nested_dataclass(annotation)
    if nested is None:
        return _read_plain(annotation, value, path)
    if not isinstance(value, Mapping):
        message = f"must be a table, got {show_value(value)}"
        return Built(None, (KeyFault(path, message, f"write [{'.'.join(path)}] on a line of its own"),))
    return build(nested, value, path)


def _nested_dataclass(annotation: object) -> type | None:
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((part for part in candidates if isinstance(part, type) and is_dataclass(part)), None)


def _read_plain(annotation: object, value: object, path: KeyPath) -> Built:
    adapter: TypeAdapter[Any] = TypeAdapter(_raw_type(annotation), config=ConfigDict(allow_inf_nan=True))
    try:
        read = adapter.validate_python(value)
    except ValidationError:
        message = f"must be {describe_type(annotation)}, got {show_value(value)}"
        return Built(None, (KeyFault(path, message, _conversion_hint(annotation, value, path[-1])),))
    return Built(_as_annotated(annotation, read))


def _raw_type(annotation: object) -> Any:
    """What pydantic is asked to check: no conversions but integer to number, list to tuple, name to enum."""
    if annotation in _PLAIN:
        return _PLAIN[annotation][0]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return Union[tuple(_raw_type(part) for part in arguments)]  # noqa: UP007 - built at run time
    if origin in (tuple, list):
        entries: Any = tuple(part if part is Ellipsis else _raw_type(part) for part in arguments)
        return Annotated[origin[entries], Strict(False)]
    return annotation


def _as_annotated(annotation: object, value: object) -> object:
    if annotation is float or float in get_args(annotation):
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if annotation is Path or Path in get_args(annotation):
        return Path(value) if isinstance(value, str) else value
    return value


def _conversion_hint(annotation: object, value: object, name: str) -> str:
    """How to write what was probably meant."""
    wanted = set(get_args(annotation)) | {annotation}
    if isinstance(value, str) and wanted & {int, float} and re.fullmatch(r"\s*[-+]?\d[\d_.]*\s*", value):
        return f"write {name} = {value.strip()}, without quotes"
    if isinstance(value, str) and bool in wanted and value.lower() in ("true", "false"):
        return f"write {name} = {value.lower()}, without quotes"
    if isinstance(value, int | float) and wanted & {str, Path}:
        return f'write {name} = "{show_value(value)}"'
    if isinstance(value, str) and get_origin(annotation) in (tuple, list):
        return f"write {name} = [{show_value(value)}]"
    return ""


def _construct(
    dataclass_type: type,
    values: dict[str, object],
    path: KeyPath,
    faults: list[KeyFault],
) -> Built:
    try:
        built = dataclass_type(**values)
    except KVRelayError as error:
        found = [
            _value_fault(line, dataclass_type, values, path)
            for line in error.message.splitlines()
            if line.strip()
        ]
        left_out = [fault.path for fault in faults]
        # A complaint about a key that is at fault already only follows from its being left out.
        faults.extend(fault for fault in found if fault.path not in left_out)
        return Built(None, tuple(faults))
    return Built(None if faults else built, tuple(faults))


def _value_fault(line: str, dataclass_type: type, values: Mapping[str, object], path: KeyPath) -> KeyFault:
    """A dataclass's own complaint; it begins with the name of the field at fault, or mentions it."""
    words = re.findall(r"[A-Za-z_][A-Za-z_0-9]*", line)
    names = {spec.name for spec in fields(dataclass_type)}
    name = next((word for word in words if word in names and word in values), "")
    name = name or next((word for word in words if word in names), "")
    if not name:
        return KeyFault(path, line)
    starts = re.match(rf"(?:[A-Za-z_]\w*\.)*{re.escape(name)}\b:?\s*", line)
    return KeyFault((*path, key_of_field(name)), line[starts.end() :] if starts else f"is at fault: {line}")
