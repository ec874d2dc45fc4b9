"""Builds a model from a folder, one merged weight at a time: there is never a second copy of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrelay.engine.device import Device
from kvrelay.engine.linear import Embedding, Linear
from kvrelay.engine.model.config import ModelConfig
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
) -> ModelWeights:
    """Read all weights of a model.

    Raises:
        ConfigError: a tensor is missing or has another shape than the configuration says.
    """
    return _Loader(files, config, device, dtype).load(max_model_len)


class _Loader:
    def __init__(
        self,
        files: WeightFolder | RandomWeights,
        config: ModelConfig,
        device: Device,
        dtype: torch.dtype,
    ) -> None:
        self._files = files
        self._config = config
        self._device = device
        self._dtype = dtype

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
            return self._device.tied_embedding(matrix)
        output = self._files.read_stacked(["lm_head.weight"], [shape], self._dtype)
        return self._device.embedding(matrix), self._device.linear(output)

    def _layer(self, prefix: str) -> LayerWeights:
        config = self._config
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LayerWeights(
            input_norm=self._vector(prefix + "input_layernorm.weight", config.hidden_size),
            qkv=self._linear(
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
            attention_output=self._linear([attention + "o_proj"], [config.hidden_size], query_size),
            post_attention_norm=self._vector(prefix + "post_attention_layernorm.weight", config.hidden_size),
            gate_up=self._linear(
                [mlp + "gate_proj", mlp + "up_proj"], [config.intermediate_size] * 2, config.hidden_size
            ),
            down=self._linear([mlp + "down_proj"], [config.hidden_size], config.intermediate_size),
        )

    def _linear(self, names: list[str], out_features: list[int], in_features: int) -> Linear:
        """The named projections merged into one; biases are taken where the weights have them."""
        weight = self._files.read_stacked(
            [f"{name}.weight" for name in names], [(out, in_features) for out in out_features], self._dtype
        )
        biases = [f"{name}.bias" for name in names]
        bias: Tensor | None = None
        if any(name in self._files for name in biases):
            bias = self._files.read_stacked(biases, [(out,) for out in out_features], self._dtype)
        return self._device.linear(weight, bias)

    def _vector(self, name: str, size: int) -> Tensor:
        return self._device.constant(self._files.read_stacked([name], [(size,)], self._dtype))
