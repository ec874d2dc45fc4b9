"""A model's shape, read from the `config.json` of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.engine.model.rope import RopeConfig, read_rope_config

Json = Mapping[str, object]

_FAMILIES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Llama-like decoder: RMS norm, rotary positions, grouped-query attention, SwiGLU.

    `max_model_len` is the longest context that full attention is right for: the model's own, or its
    sliding window where that is shorter. `has_qk_norm`: queries and keys are normalised per head (Qwen3).
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_model_len: int
    tied_embeddings: bool
    has_qk_norm: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]


def read_model_config(folder: Path) -> ModelConfig:
    """Read and check a model folder's configuration.

    Raises:
        ConfigError: there is no such model, or it uses something that this engine does not have, by name.
    """
    raw = _read_json(folder / "config.json")
    family = _family(raw)
    _refuse_what_is_missing(raw)
    hidden_size, num_heads = _int(raw, "hidden_size"), _int(raw, "num_attention_heads")
    max_model_len = _int(raw, "max_position_embeddings")
    window = _sliding_window(raw, family)
    return ModelConfig(
        family=family,
        num_layers=_int(raw, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_int(raw, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_int(raw, "num_key_value_heads", num_heads),
        head_dim=_int(raw, "head_dim", hidden_size // num_heads),
        vocab_size=_int(raw, "vocab_size"),
        rms_norm_eps=_float(raw, "rms_norm_eps", 1e-6),
        max_model_len=min(max_model_len, window) if window is not None else max_model_len,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        has_qk_norm=family == "qwen3",
        rope=read_rope_config(raw),
        eos_token_ids=_eos_token_ids(folder, raw),
    )


def _read_json(path: Path) -> Json:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return raw


def _family(raw: Json) -> str:
    architectures = raw.get("architectures")
    named = architectures if isinstance(architectures, list) else [architectures]
    for architecture in named:
        if architecture in _FAMILIES:
            return _FAMILIES[str(architecture)]
    raise ConfigError(
        f"architecture {', '.join(map(str, named))} is not supported; supported: {', '.join(_FAMILIES)}"
    )


def _refuse_what_is_missing(raw: Json) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("quantization_config") is not None:
        raise ConfigError("quantization_config is set: quantized weights are not supported")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not supported")


def _sliding_window(raw: Json, family: str) -> int | None:
    """The window that limits attention, in tokens; None: there is none."""
    if family in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        return None
    window = raw.get("sliding_window")
    return window if isinstance(window, int) else None


def _eos_token_ids(folder: Path, raw: Json) -> tuple[int, ...]:
    """All end-of-sequence tokens; `generation_config.json` has the last word."""
    generation = folder / "generation_config.json"
    found = _read_json(generation).get("eos_token_id") if generation.exists() else None
    found = raw.get("eos_token_id") if found is None else found
    if isinstance(found, int):
        return (found,)
    return (
        tuple(token_id for token_id in found if isinstance(token_id, int)) if isinstance(found, list) else ()
    )


def _int(raw: Json, name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise ConfigError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _float(raw: Json, name: str, default: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)
