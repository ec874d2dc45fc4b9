"""GGUF to Hugging Face: dequantized weights, config, tokenizer and chat template of a Llama-family model.

At most a slice of one tensor is in memory: the safetensors header follows from the shapes, and the data
stream after it. What is not fully understood (another architecture, pre-tokenizer, rope scaling, an
unknown tensor) is refused by name.
Sources: the GGUF and safetensors specifications; llama.cpp's Hugging Face converter, undone here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvrelay.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from numpy.typing import NDArray

    from kvrelay.engine.embedded_model import ProgressListener

_FLOAT32_BYTES: Final = 4
_CONTROL_TOKEN: Final = 3
"""GGUF's token type of the special tokens, which no text may spell by merges."""
_USER_DEFINED_TOKEN: Final = 4
_HEADS_PER_SLICE: Final = 64
"""How many heads' worth of rows are dequantized at once: bounds memory, and never splits a head."""

_HF_GLOBAL_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_HF_LAYER_NAMES: Final = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ROTARY_SUFFIXES: Final = ("attn_q.weight", "attn_k.weight")

_PRE_TOKENIZERS: Final = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
}
"""GGUF's name of a pre-tokenizer -> the same in a tokenizer.json."""


def convert_gguf(source: Path, folder: Path, on_progress: ProgressListener) -> None:
    """Write config, generation config, tokenizer and float32 safetensors of `source` into `folder`.

    Raises:
        ConfigError: `gguf` is not installed, the file is no GGUF, or it holds something unknown.
        OSError: `folder` can't be written.
    """
    on_progress(0.0, f"reading {source.name}")
    reader = _open(source)
    metadata = _Metadata(reader)
    config = _model_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(metadata))
    _write_json(folder / "tokenizer.json", _tokenizer(metadata))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    write_float32_safetensors(reader.tensors, metadata.head_dim, folder / "model.safetensors", on_progress)


def _open(source: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("converting a GGUF needs the gguf package: pip install 'kvrelay[model]'") from error
    try:
        return GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{source} is not a readable GGUF file: {error}") from error


@dataclass(frozen=True, slots=True)
class _Metadata:
    """A GGUF's key-value part, with what is missing or unknown turned into a ConfigError."""

    reader: GGUFReader

    def __post_init__(self) -> None:
        self._require("general.architecture", "llama")
        self._require("tokenizer.ggml.model", "gpt2")
        if self.optional("llama.rope.scaling.type") not in (None, "none"):
            raise ConfigError("a GGUF with rope scaling can't be converted")
        if self.optional("llama.rope.dimension_count") not in (None, self.head_dim):
            raise ConfigError("a GGUF with partial rotary embedding can't be converted")

    def optional(self, key: str) -> Any:
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def required(self, key: str) -> Any:
        value = self.optional(key)
        if value is None:
            raise ConfigError(f"the GGUF has no {key}")
        return value

    def token(self, role: str) -> str:
        """Text of the `role` token (``bos``, ``eos``, ``padding``, ``unknown``)."""
        return str(self.required("tokenizer.ggml.tokens")[self.required(f"tokenizer.ggml.{role}_token_id")])

    @property
    def num_heads(self) -> int:
        return int(self.required("llama.attention.head_count"))

    @property
    def head_dim(self) -> int:
        own = self.optional("llama.attention.key_length")
        return int(own or self.required("llama.embedding_length") // self.num_heads)

    def _require(self, key: str, expected: str) -> None:
        if (found := self.required(key)) != expected:
            raise ConfigError(f"a GGUF with {key} = {found!r} can't be converted, only {expected!r}")


def _model_config(metadata: _Metadata, *, tied: bool) -> dict[str, object]:
    required = metadata.required
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": required("llama.embedding_length"),
        "intermediate_size": required("llama.feed_forward_length"),
        "num_hidden_layers": required("llama.block_count"),
        "num_attention_heads": metadata.num_heads,
        "num_key_value_heads": metadata.optional("llama.attention.head_count_kv") or metadata.num_heads,
        "head_dim": metadata.head_dim,
        "max_position_embeddings": required("llama.context_length"),
        "rope_theta": _shortest_float32(metadata.optional("llama.rope.freq_base") or 10_000.0),
        "rms_norm_eps": _shortest_float32(required("llama.attention.layer_norm_rms_epsilon")),
        "vocab_size": len(required("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        **_generation_config(metadata),
    }


def _shortest_float32(value: float) -> float:
    """The decimal that was meant: GGUF's 1e-5 is a float32, 9.999999747378752e-06 when widened."""
    import numpy as np

    return float(str(np.float32(value)))


def _generation_config(metadata: _Metadata) -> dict[str, object]:
    eos_token_id = metadata.required("tokenizer.ggml.eos_token_id")
    padding_token_id = metadata.optional("tokenizer.ggml.padding_token_id")
    return {
        "bos_token_id": metadata.required("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id if padding_token_id is None else padding_token_id,
    }


def _tokenizer(metadata: _Metadata) -> dict[str, object]:
    """Byte-level BPE as a tokenizer.json; tokens and merges are spelled alike in both formats."""
    pre_name = metadata.required("tokenizer.ggml.pre")
    if pre_name not in _PRE_TOKENIZERS:
        raise ConfigError(f"a GGUF with pre-tokenizer {pre_name!r} can't be converted")
    tokens = metadata.required("tokenizer.ggml.tokens")
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, metadata.required("tokenizer.ggml.token_type")),
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre_name],
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata.required("tokenizer.ggml.merges")],
        },
    }


def _added_tokens(tokens: Sequence[str], token_types: Sequence[int]) -> list[dict[str, object]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": token_id, "content": token, **flags, "special": token_type == _CONTROL_TOKEN}
        for token_id, (token, token_type) in enumerate(zip(tokens, token_types, strict=True))
        if token_type in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN)
    ]


def _tokenizer_config(metadata: _Metadata) -> dict[str, object]:
    config: dict[str, object] = {
        # The generic class takes tokenizer.json as it is; a model's own class rebuilds the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": metadata.token("bos"),
        "eos_token": metadata.token("eos"),
        "model_max_length": metadata.required("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for name, role in (("unk_token", "unknown"), ("pad_token", "padding")):
        if metadata.optional(f"tokenizer.ggml.{role}_token_id") is not None:
            config[name] = metadata.token(role)
    if (chat_template := metadata.optional("tokenizer.chat_template")) is not None:
        config["chat_template"] = chat_template
    return config


def write_float32_safetensors(
    tensors: Sequence[ReaderTensor], head_dim: int, path: Path, on_progress: ProgressListener
) -> None:
    """Stream all `tensors`, dequantized, to `path` under their Hugging Face names, and flush it to disk.

    Raises:
        ConfigError: a tensor's name is unknown.
    Source: the safetensors format description (8-byte header length, JSON header, contiguous data).
    """
    with path.open("wb") as file:
        file.write(_safetensors_header(tensors))
        for index, tensor in enumerate(tensors):
            for rows in _float32_slices(tensor, head_dim):
                file.write(rows.tobytes())
            on_progress((index + 1) / len(tensors), f"dequantizing {tensor.name}")
        file.flush()
        os.fsync(file.fileno())


def _safetensors_header(tensors: Sequence[ReaderTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for tensor in tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        end_bytes = offset_bytes + prod(shape) * _FLOAT32_BYTES
        data_offsets = [offset_bytes, end_bytes]
        entries[_hf_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": data_offsets}
        offset_bytes = end_bytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _hf_name(name: str) -> str:
    if name in _HF_GLOBAL_NAMES:
        return _HF_GLOBAL_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if prefix != "blk" or suffix not in _HF_LAYER_NAMES:
        raise ConfigError(f"a GGUF with a tensor {name!r} can't be converted")
    return f"model.layers.{layer}.{_HF_LAYER_NAMES[suffix]}"


def _float32_slices(tensor: ReaderTensor, head_dim: int) -> Iterator[NDArray[np.float32]]:
    """Consecutive slices of rows, each a whole number of heads, with rotary rows put back in order."""
    import numpy as np
    from gguf.quants import dequantize

    num_rows = head_dim * _HEADS_PER_SLICE
    for start in range(0, len(tensor.data), num_rows):
        rows = dequantize(tensor.data[start : start + num_rows], tensor.tensor_type)
        if tensor.name.endswith(_ROTARY_SUFFIXES):
            rows = _split_rotary_halves(rows, head_dim)
        yield np.ascontiguousarray(rows, dtype="<f4")


def _split_rotary_halves(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows ``[num_heads * head_dim, in]``, each head's from interleaved pairs to first and second half.

    llama.cpp rotates neighbouring rows, Hugging Face row i with row ``i + head_dim / 2``.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
