"""Reads single tensors out of a folder of safetensors files, one file or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvrelay.core.errors import ConfigError

_SAMPLE_BYTES: Final = 1 << 16
_NUM_SAMPLES: Final = 16

OnBytesRead = Callable[[int], None]


class WeightFolder:
    """Tensors by name. A tensor is read when asked for; nothing of a file stays mapped between two reads.

    Raises:
        ConfigError: there are no safetensors files, or they can't be read.
    """

    def __init__(self, folder: Path, on_bytes_read: OnBytesRead | None = None) -> None:
        self._folder = folder
        self._on_bytes_read = on_bytes_read
        self._file_of = {name: path for path in _weight_files(folder) for name in _tensor_names(path)}

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in set(self._file_of.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy tensor `name` into `target`, converting its dtype.

        Raises:
            ConfigError: there is no such tensor, or its shape differs.
        """
        path = self._file_of.get(name)
        if path is None:
            raise ConfigError(f"{self._folder}: the weights hold no tensor {name!r}")
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape:
                raise ConfigError(
                    f"{path}: {name} has shape {list(tensor.shape)}, expected {list(target.shape)}"
                )
            target.copy_(tensor)
            if self._on_bytes_read is not None:
                self._on_bytes_read(tensor.numel() * tensor.element_size())

    def read_stacked(self, names: list[str], shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """Read tensors one below the other into one new tensor: ``[sum of first dimensions, …]``."""
        rows = [shape[0] for shape in shapes]
        stacked = torch.empty((sum(rows), *shapes[0][1:]), dtype=dtype)
        for name, part in zip(names, torch.split(stacked, rows), strict=True):
            self.read_into(name, part)
        return stacked


def model_digest(folder: Path) -> str:
    """Names the weights: hash of the configuration, all tensor headers, file sizes, and samples of the bytes.

    Cheap for any size of model; 16 samples of 64 KiB a file tell two trainings of one shape apart.
    """
    digest = sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, size)))
            for index in range(_NUM_SAMPLES):
                file.seek(8 + header_bytes + (size - 8 - header_bytes) * index // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is not a safetensors index: {error!r}") from error
        paths = [folder / Path(name).name for name in names]
    else:
        paths = sorted(folder.glob("model*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ConfigError(f"{folder} lacks {', '.join(missing) or 'model.safetensors'}")
    return paths


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}") from error
