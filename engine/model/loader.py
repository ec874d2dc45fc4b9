"""Builds a model from a folder, one merged weight at a time: there is never a second copy of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrelay.engine.device import Device
from kvrelay.engine.linear import Embedding, Linear
from kvrelay.engine.model.config import ModelConfig
from kvrelay.engine.model.parallel import (
    Collectives,
    GatheredLinear,
    RowParallelLinear,
    Shard,
    vocabulary_part,
)
from kvrelay.engine.model.random_weights import RandomWeights
from kvrelay.engine.model.rope import rope_tables
from kvrelay.engine.model.transformer import LayerWeights, ModelWeights
from kvrelay.engine.model.weights import WeightFolder


def load_weights(
    files: WeightFolder | RandomWeights,
    config: ModelConfig,
    device: Device,
    dtype: torch.dtype,
    max_model_len: int,
    collectives: Collectives | None = None,
) -> ModelWeights:
    """Read all weights of a model, or with `collectives` this rank's part of them; `config` is the whole's.

    Raises:
        ConfigError: a tensor is missing or has another shape than the configuration says.
    """
    return _Loader(files, config, device, dtype, collectives).load(max_model_len)


class _Loader:
    def __init__(
        self,
        files: WeightFolder | RandomWeights,
        config: ModelConfig,
        device: Device,
        dtype: torch.dtype,
        collectives: Collectives | None,
    ) -> None:
        self._files = files
        self._config = config
        self._device = device
        self._dtype = dtype
        self._collectives = collectives
        self._shard = Shard() if collectives is None else collectives.shard

    def load(self, max_model_len: int) -> ModelWeights:
        config = self._config
        embedding, output = self._embedding_and_output()
        cosines, sines = rope_tables(config.rope, config.head_dim, max_model_len, self._dtype)
        return ModelWeights(
            embedding=embedding,
            layers=[self._layer(f"model.layers.{index}.") for index in range(config.num_layers)],
            final_norm=self._vector("model.norm.weight", config.hidden_size),
            output=output,
            cosines=self._device.constant(cosines.unsqueeze(1)),
            sines=self._device.constant(sines.unsqueeze(1)),
        )

    def _embedding_and_output(self) -> tuple[Embedding, Linear]:
        shape = (self._config.vocab_size, self._config.hidden_size)
        matrix = self._files.read_stacked(["model.embed_tokens.weight"], [shape], self._dtype)
        if self._config.tied_embeddings:
            if self._collectives is None:
                return self._device.tied_embedding(matrix)
            shared = self._device.constant(matrix)
            return self._device.embedding(shared), self._output(shared)
        embedding = self._device.embedding(matrix)
        return embedding, self._output(self._files.read_stacked(["lm_head.weight"], [shape], self._dtype))

    def _output(self, matrix: Tensor) -> Linear:
        if self._collectives is None:
            return self._device.linear(matrix)
        part = self._device.linear(vocabulary_part(matrix, self._shard))
        return GatheredLinear(part, self._collectives, self._config.vocab_size)

    def _layer(self, prefix: str) -> LayerWeights:
        config = self._config
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LayerWeights(
            input_norm=self._vector(prefix + "input_layernorm.weight", config.hidden_size),
            qkv=self._by_columns(
                [f"{attention}{name}_proj" for name in "qkv"],
                [query_size, kv_size, kv_size],
                config.hidden_size,
            ),
            query_norm=self._vector(attention + "q_norm.weight", config.head_dim)
            if config.has_qk_norm
            else None,
            key_norm=self._vector(attention + "k_norm.weight", config.head_dim)
            if config.has_qk_norm
            else None,
            attention_output=self._by_rows(attention + "o_proj", config.hidden_size, query_size),
            post_attention_norm=self._vector(prefix + "post_attention_layernorm.weight", config.hidden_size),
            gate_up=self._by_columns(
                [mlp + "gate_proj", mlp + "up_proj"], [config.intermediate_size] * 2, config.hidden_size
            ),
            down=self._by_rows(mlp + "down_proj", config.hidden_size, config.intermediate_size),
        )

    def _by_columns(self, names: list[str], out_features: list[int], in_features: int) -> Linear:
        """The named projections merged into one, each rank with its part of every one."""
        weight, bias = self._read(names, out_features, in_features)
        if self._shard.size > 1:
            weight = self._shard.parts(weight, out_features)
            bias = None if bias is None else self._shard.parts(bias, out_features)
        return self._device.linear(weight, bias)

    def _by_rows(self, name: str, out_features: int, in_features: int) -> Linear:
        """A projection whose inputs are split between the ranks."""
        weight, bias = self._read([name], [out_features], in_features)
        if self._collectives is None:
            return self._device.linear(weight, bias)
        part = self._shard.part(weight, dim=1).contiguous()
        linear = self._device.linear(part, bias if self._shard.rank == 0 else None)
        return RowParallelLinear(linear, self._collectives)

    def _read(
        self, names: list[str], out_features: list[int], in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        """Weights and biases one below the other; biases where the weights have them."""
        weight = self._files.read_stacked(
            [f"{name}.weight" for name in names], [(out, in_features) for out in out_features], self._dtype
        )
        biases = [f"{name}.bias" for name in names]
        if not any(name in self._files for name in biases):
            return weight, None
        return weight, self._files.read_stacked(biases, [(out,) for out in out_features], self._dtype)

    def _vector(self, name: str, size: int) -> Tensor:
        return self._device.constant(self._files.read_stacked([name], [(size,)], self._dtype))
