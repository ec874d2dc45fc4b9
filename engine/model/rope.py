"""Rotary position embeddings, plain and with the scaling of Llama 3.

Pairs are (i, i + head_dim / 2), as in Hugging Face checkpoints.
Source: Su et al. 2021 (RoFormer); the Llama 3.1 model card, for the scaling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256

import torch
from torch import Tensor

from kvrelay.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_tokens: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base `theta`, and how its frequencies are scaled."""

    theta: float
    scaling: Llama3Scaling | None

    @property
    def digest(self) -> str:
        """Names this position encoding in a KV fingerprint."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def read_rope_config(raw: Mapping[str, object]) -> RopeConfig:
    """From a `config.json`, of transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`).

    Raises:
        ConfigError: the scaling is of a kind that is not supported.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"config.json: rope parameters must be an object, got {parameters!r}")
    theta = _number(parameters.get("rope_theta", raw.get("rope_theta", 10_000.0)), "rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta, None)
    if kind != "llama3":
        raise ConfigError(f"rope scaling {kind!r} is not supported, only 'default' and 'llama3'")
    factor, low, high, original = (
        _number(parameters.get(name), f"rope scaling {name}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    return RopeConfig(theta, Llama3Scaling(factor, low, high, int(original)))


def rope_tables(
    config: RopeConfig, head_dim: int, max_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines ``[max_tokens, head_dim]`` and sines ``[max_tokens, head_dim // 2]``, computed in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.scaling is not None:
        frequencies = _scale_llama3(frequencies, config.scaling)
    angles = torch.arange(max_tokens).float()[:, None] * frequencies[None, :]
    cosines = angles.cos()
    return torch.cat((cosines, cosines), dim=1).to(dtype), angles.sin().to(dtype)


def apply_rope(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate ``[num_tokens, num_heads, head_dim]`` by rows ``[num_tokens, 1, …]`` ; returns a copy."""
    half = heads.shape[-1] // 2
    rotated = heads * cosines
    rotated[..., :half].addcmul_(heads[..., half:], sines, value=-1)
    rotated[..., half:].addcmul_(heads[..., :half], sines)
    return rotated


def _scale_llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_tokens / scaling.high_freq_factor
    shortest_scaled = scaling.original_max_tokens / scaling.low_freq_factor
    share_kept = (scaling.original_max_tokens / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    scaled = frequencies / scaling.factor
    between = (1 - share_kept) * scaled + share_kept * frequencies
    result = torch.where(wavelengths > shortest_scaled, scaled, between)
    return torch.where(wavelengths < longest_kept, frequencies, result)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)
