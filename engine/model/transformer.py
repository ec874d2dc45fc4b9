"""The forward pass: one flattened batch of tokens of many sequences through all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvrelay.engine.attention import Attention
from kvrelay.engine.linear import Embedding, Linear
from kvrelay.engine.model.config import ModelConfig
from kvrelay.engine.row_operations import RowOperations

LayerDone = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. `qkv` holds queries, keys, values one below the other; `gate_up` gate, then up."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole model. The rope tables are ``[max_model_len, 1, head_dim]`` and ``[…, head_dim // 2]``."""

    embedding: Embedding
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    output: Linear
    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """``[num_rows]`` each; `sampled_rows` are those whose logits are wanted, None: all."""

    token_ids: Tensor
    positions: Tensor
    sampled_rows: Tensor | None


class Transformer:
    """A loaded model over one attention, whose `begin` has been called for the batch.

    With tensor parallelism `config` is that of one rank's part, and `is_sharded` is set.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        attention: Attention,
        rows: RowOperations,
        *,
        is_sharded: bool = False,
    ) -> None:
        self._is_sharded = is_sharded
        self._config = config
        self._weights = weights
        self._attention = attention
        self._rows = rows
        self._rotary_and_values = [config.num_heads + config.num_kv_heads, config.num_kv_heads]
        self._queries_and_keys = [config.num_heads, config.num_kv_heads]

    def forward(self, batch: TokenBatch, layer_done: LayerDone | None) -> Tensor:
        """Write the batch's KV; return logits ``[len(sampled_rows), vocab_size]``."""
        weights = self._weights
        hidden = weights.embedding(batch.token_ids)
        cosines = weights.cosines.index_select(0, batch.positions)
        sines = weights.sines.index_select(0, batch.positions)
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            attended = self._attend(index, layer, hidden, cosines, sines)
            if layer_done is not None and not self._is_sharded:
                layer_done(index)
            if index == last and batch.sampled_rows is not None:  # Nothing after this needs the other rows.
                attended, hidden = attended[batch.sampled_rows], hidden[batch.sampled_rows]
                if not hidden.shape[0] and not self._is_sharded:
                    break
            hidden = layer.attention_output.add_to(hidden, attended)
            if layer_done is not None and self._is_sharded:  # the sum over the ranks waits for all their KV
                layer_done(index)
            if not hidden.shape[0]:  # far quicker than len()
                break
            hidden = layer.down.add_to(hidden, self._gated(layer, hidden))
        if not hidden.shape[0]:
            return hidden.new_empty((0, self._config.vocab_size))
        return weights.output(self._rows.rms_norm(hidden, weights.final_norm))

    def _attend(
        self, index: int, layer: LayerWeights, hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensor:
        """``[num_rows, num_heads * head_dim]``; stores the rows' keys and values."""
        projected = layer.qkv(self._rows.rms_norm(hidden, layer.input_norm))
        projected = projected.view(hidden.shape[0], -1, self._config.head_dim)
        heads, values = projected.split_with_sizes(self._rotary_and_values, 1)
        if layer.query_norm is not None and layer.key_norm is not None:
            heads = self._rows.norm_heads(heads, self._config.num_heads, layer.query_norm, layer.key_norm)
        heads = self._rows.rotate(heads, cosines, sines)
        queries, keys = heads.split_with_sizes(self._queries_and_keys, 1)
        self._attention.write(index, keys, values)
        return self._attention.attend(index, queries).flatten(1)

    def _gated(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        return self._rows.gate(layer.gate_up(self._rows.rms_norm(hidden, layer.post_attention_norm)))
