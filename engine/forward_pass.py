"""One step as plain data, and what a rank does with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvrelay.engine.attention import Attention, Span
from kvrelay.engine.model.transformer import LayerDone, TokenBatch, Transformer
from kvrelay.engine.sequence import Chunk

Int64s: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a forward pass is given: `token_ids` and `positions` ``[num_rows]``, single tokens first, as in
    `spans`; `sampled_rows` are those whose logits are wanted, in the order in which they are."""

    token_ids: Int64s
    positions: Int64s
    sampled_rows: Int64s
    spans: tuple[Span, ...]


def step_inputs(chunks: Sequence[Chunk]) -> StepInputs:
    """Rows with single tokens first, logits in the order of `chunks`."""
    singles = [chunk for chunk in chunks if chunk.num_tokens == 1]
    others = [chunk for chunk in chunks if chunk.num_tokens > 1]
    last_row = {id(chunk): row for row, chunk in enumerate(singles)}
    num_rows = len(singles)
    for chunk in others:
        num_rows += chunk.num_tokens
        last_row[id(chunk)] = num_rows - 1
    return StepInputs(
        _joined(
            [chunk.sequence.token_ids[chunk.start] for chunk in singles],
            [np.array(chunk.sequence.token_ids[chunk.start : chunk.end], dtype=np.int64) for chunk in others],
        ),
        _joined([chunk.start for chunk in singles], [np.arange(chunk.start, chunk.end) for chunk in others]),
        np.array([last_row[id(chunk)] for chunk in chunks if chunk.samples], dtype=np.int64),
        tuple(Span(chunk.sequence.block_table, chunk.start, chunk.num_tokens) for chunk in singles + others),
    )


def slots_of(spans: Sequence[Span], block_size: int) -> Int64s:
    """``[num_rows]``: where in the cache each row's KV goes; single tokens come first."""
    singles = [span for span in spans if span.num_tokens == 1]
    return _joined(
        [
            span.block_table[span.start // block_size] * block_size + span.start % block_size
            for span in singles
        ],
        [_slots(span, block_size) for span in spans if span.num_tokens > 1],
    )


def _slots(span: Span, block_size: int) -> Int64s:
    first = span.start // block_size
    blocks = np.array(span.block_table[first : -(-span.end // block_size)], dtype=np.int64)
    slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
    return slots[span.start - first * block_size :][: span.num_tokens]


def _joined(singles: list[int], others: list[Int64s]) -> Int64s:
    return np.concatenate([np.array(singles, dtype=np.int64), *others])


class ForwardPass:
    """A model and its attention, on one device; a step has at most `max_step_tokens`."""

    def __init__(
        self,
        model: Transformer,
        attention: Attention,
        *,
        block_size: int,
        device: torch.device,
        max_step_tokens: int,
        max_model_len: int,
    ) -> None:
        self._max_step_tokens = max_step_tokens
        self._max_model_len = max_model_len
        self._model = model
        self._attention = attention
        self._block_size = block_size
        self._device = device

    @torch.inference_mode()
    def prepare_thread(self) -> None:
        """What the thread that calls `run` needs once, before."""
        self._attention.prepare_thread(self._max_step_tokens, self._max_model_len)

    def run(self, inputs: StepInputs, layer_done: LayerDone | None) -> Tensor:
        """Compute the step's KV; returns logits ``[len(sampled_rows), vocab_size]``."""
        self._attention.begin(inputs.spans, torch.from_numpy(slots_of(inputs.spans, self._block_size)))
        batch = TokenBatch(
            self._upload(inputs.token_ids),
            self._upload(inputs.positions),
            self._upload(inputs.sampled_rows),
        )
        return self._model.forward(batch, layer_done)

    def _upload(self, array: Int64s) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # or the copy would wait for the step that is under way
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
