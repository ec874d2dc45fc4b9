"""Tensor parallelism as the model sees it: which part of each matrix a rank holds, and where ranks meet.

Queries, keys, values, gate and up are split by columns, so that each rank has whole heads and a part of the
inner size; output and down projections by rows, each followed by one sum over the ranks. The output layer is
split by vocabulary and its logits are gathered. Source: Megatron-LM, arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import KVLayout
from kvrelay.engine.linear import Linear
from kvrelay.engine.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def part(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's of `size` equal parts; a view."""
        length = tensor.shape[dim] // self.size
        assert length * self.size == tensor.shape[dim]
        return tensor.narrow(dim, self.rank * length, length)

    def parts(self, stacked: Tensor, lengths: Sequence[int]) -> Tensor:
        """This rank's part of each of the tensors that lie one below the other, again one below the other."""
        return torch.cat([self.part(part) for part in torch.split(stacked, list(lengths))])

    def model(self, config: ModelConfig) -> ModelConfig:
        """The configuration of this rank's part.

        Raises:
            ConfigError: heads or inner size can't be divided between so many ranks.
        """
        faults = [
            f"tensor_parallel_size {self.size} does not divide the model's {name} {value}"
            for name, value in (
                ("num_attention_heads", config.num_heads),
                ("num_key_value_heads", config.num_kv_heads),
                ("intermediate_size", config.intermediate_size),
            )
            if value % self.size
        ]
        if faults:
            raise ConfigError("\n".join(faults))
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
        )

    def layout(self, layout: KVLayout) -> KVLayout:
        """The cache of this rank: all blocks, its heads."""
        return replace(layout, num_kv_heads=layout.num_kv_heads // self.size)


class Collectives(Protocol):
    """What the ranks of one engine do together; each of them makes the same calls in the same order.

    On a GPU the calls are queued on the current stream, and can be captured.
    """

    @property
    def shard(self) -> Shard: ...

    def all_reduce(self, rows: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; may be in place."""
        ...

    def all_gather(self, rows: Tensor) -> Tensor:
        """``[size, *rows.shape]``, by rank."""
        ...

    def barrier(self) -> None:
        """What follows runs once every rank has come to this point."""
        ...


class RowParallelLinear:
    """A matrix that is split by rows, with the sum over the ranks; a bias belongs to rank 0."""

    def __init__(self, linear: Linear, collectives: Collectives) -> None:
        self._linear = linear
        self._collectives = collectives

    def __call__(self, rows: Tensor) -> Tensor:
        return self._collectives.all_reduce(self._linear(rows))

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """Rank 0 adds the residual, which all ranks have, so that the sum holds it once."""
        return self._sum(residual, rows, adds_residual=self._collectives.shard.rank == 0)

    def replace(self, residual: Tensor, rows: Tensor) -> Tensor:
        return self._sum(residual, rows, adds_residual=False)

    def _sum(self, residual: Tensor, rows: Tensor, *, adds_residual: bool) -> Tensor:
        if not len(rows):  # ranks meet all the same: what comes after relies on it
            self._collectives.barrier()
            return residual
        partial = (self._linear.add_to if adds_residual else self._linear.replace)(residual, rows)
        return self._collectives.all_reduce(partial)


class GatheredLinear:
    """The output layer: each rank computes the logits of its part of the vocabulary, all get the whole."""

    def __init__(self, linear: Linear, collectives: Collectives, vocab_size: int) -> None:
        self._linear = linear
        self._collectives = collectives
        self._vocab_size = vocab_size

    def __call__(self, rows: Tensor) -> Tensor:
        gathered = self._collectives.all_gather(self._linear(rows))
        logits = gathered.transpose(0, 1).reshape(len(rows), -1)
        return logits[:, : self._vocab_size].contiguous()

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return residual + self(rows)

    def replace(self, residual: Tensor, rows: Tensor) -> Tensor:
        return self(rows)


def vocabulary_part(matrix: Tensor, shard: Shard) -> Tensor:
    """This rank's rows of the output layer ``[vocab_size, hidden_size]``: a view where they divide evenly,
    else padded with zeros."""
    missing = -matrix.shape[0] % shard.size
    if not missing:
        return shard.part(matrix)
    return shard.part(torch.cat((matrix, matrix.new_zeros((missing, matrix.shape[1])))))
