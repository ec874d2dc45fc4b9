"""What the modelled nodes take for prefill, for moving KV and for decode: read from a cost-model file."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SHIPPED: Final = ("independent", "h100")
"""Names that stand for the files in the folder `cost_models`."""


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """Seconds to compute ``new`` tokens behind ``cached`` ones:
    ``base_s + token_s * new + pair_s * new * (cached + new / 2)``."""

    base_s: float
    token_s: float
    pair_s: float

    def seconds(self, num_tokens: Ints | int, num_cached: Ints) -> Floats:
        """Of prompts of `num_tokens` tokens each, or all of one length, `num_cached` of them cached."""
        new = num_tokens - num_cached
        seconds: Floats = self.base_s + new * (self.token_s + self.pair_s * (num_cached + new / 2))
        return seconds

    def one(self, num_tokens: int, num_cached: int) -> float:
        """The same for one prompt."""
        new = num_tokens - num_cached
        return self.base_s + new * (self.token_s + self.pair_s * (num_cached + new / 2))


@dataclass(frozen=True, slots=True)
class LinkModel:
    """Seconds to move KV: `pull_base_s` and `pull_token_s` from one prefill node's cache to another's, before
    its prefill; `handoff_base_s` and `handoff_token_s` what is left of the handoff once the prefill, beside
    which most of it moves, is over."""

    pull_base_s: float
    pull_token_s: float
    handoff_base_s: float
    handoff_token_s: float

    def pull_s(self, num_tokens: int) -> float:
        return self.pull_base_s + self.pull_token_s * num_tokens if num_tokens > 0 else 0.0

    def handoff_s(self, num_tokens: int) -> float:
        return self.handoff_base_s + self.handoff_token_s * num_tokens


@dataclass(frozen=True, slots=True)
class DecodeModel:
    """Seconds of a decode step: by batch, interpolated between `batches` and their `step_s` (beyond the last
    as between the last two), and `context_token_s` more for each token of context that is read. A node has
    room for `kv_tokens` tokens of KV and `max_num_seqs` sequences."""

    batches: tuple[float, ...]
    step_s: tuple[float, ...]
    context_token_s: float
    kv_tokens: int
    max_num_seqs: int

    def batch_step_s(self) -> tuple[float, ...]:
        """Seconds by batch, ``[max_num_seqs + 1]``, without the context's part; of no sequence: 0."""
        xs, ys = self.batches, self.step_s
        inside = np.interp(np.arange(self.max_num_seqs + 1), xs, ys)
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else 0.0
        beyond = np.maximum(np.arange(self.max_num_seqs + 1) - xs[-1], 0.0) * slope
        return (0.0, *(inside + beyond)[1:].tolist())


@dataclass(frozen=True, slots=True)
class CostModel:
    """All of it, under the name of its file."""

    name: str
    prefill: PrefillModel
    link: LinkModel
    decode: DecodeModel


def load_cost_model(name_or_file: str) -> CostModel:
    """A shipped model by its name, or one from a TOML or (``.json``) JSON file.

    Raises:
        ConfigError: there is no such file, or it has faults; all are named.
    """
    if name_or_file in SHIPPED:
        file = resources.files("kvrelay.simulator") / "cost_models" / f"{name_or_file}.toml"
        return _parse(tomllib.loads(file.read_text()), name_or_file)
    path = Path(name_or_file)
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        shipped = " and ".join(SHIPPED)
        message = f"cost model {name_or_file} can't be read ({error.strerror}); shipped are {shipped}"
        raise ConfigError(message, field="cost-model") from error
    except ValueError as error:
        raise ConfigError(f"cost model {name_or_file}: {error}", field="cost-model") from error
    return _parse(content, path.stem)


def _parse(content: object, name: str) -> CostModel:
    faults: list[str] = []
    tables = content if isinstance(content, dict) else {}
    parts: dict[str, Any] = {}
    for part, kind in (("prefill", PrefillModel), ("link", LinkModel), ("decode", DecodeModel)):
        table = tables.get(part)
        parts[part] = _read_table(table if isinstance(table, dict) else {}, part, kind, faults)
    unknown = sorted(set(tables) - {"prefill", "link", "decode", "comment"})
    faults += [f"[{key}] is no part of a cost model" for key in unknown]
    if faults:
        raise ConfigError(f"cost model {name}: " + "; ".join(faults), field="cost-model")
    return CostModel(name, **parts)


def _read_table(table: Mapping[str, Any], part: str, kind: Any, faults: list[str]) -> Any:
    values: dict[str, Any] = {}
    for spec in fields(kind):
        value = table.get(spec.name)
        if not _is_good(value, str(spec.type)):
            faults.append(f"{part}.{spec.name} must be {_WANTED[str(spec.type)]}, got {value!r}")
        values[spec.name] = tuple(map(float, value)) if isinstance(value, list) and not faults else value
    faults += [f"{part}.{key} is unknown" for key in sorted(set(table) - set(values))]
    if kind is DecodeModel and not faults:
        faults += _table_faults(values["batches"], values["step_s"])
    return kind(**values) if not faults else None


_WANTED: Final = {
    "float": "a number of at least 0",
    "int": "an integer above 0",
    "tuple[float, ...]": "a list of numbers of at least 0",
}


def _is_good(value: object, kind: str) -> bool:
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if kind == "float":
        return _is_number(value)
    return isinstance(value, list) and bool(value) and all(_is_number(item) for item in value)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0


def _table_faults(batches: tuple[float, ...], step_s: tuple[float, ...]) -> list[str]:
    if len(batches) != len(step_s):
        return [f"decode.batches has {len(batches)} entries, decode.step_s {len(step_s)}"]
    if any(later <= earlier for earlier, later in pairwise(batches)):
        return ["decode.batches must rise"]
    if min(step_s) <= 0:
        return ["decode.step_s must be above 0"]
    return []
