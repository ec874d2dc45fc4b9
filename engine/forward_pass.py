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
from kvrelay.engine.host_kv import slot_runs
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
    ordered = sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)
    token_ids: list[int] = []
    positions: list[int] = []
    last_row: dict[int, int] = {}
    for chunk in ordered:
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        last_row[id(chunk)] = len(token_ids) - 1
    return StepInputs(
        np.array(token_ids, dtype=np.int64),
        np.array(positions, dtype=np.int64),
        np.array([last_row[id(chunk)] for chunk in chunks if chunk.samples], dtype=np.int64),
        tuple(Span(chunk.sequence.block_table, chunk.start, chunk.num_tokens) for chunk in ordered),
    )


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
        self._attention.begin(inputs.spans, self._slots(inputs.spans))
        batch = TokenBatch(
            self._upload(inputs.token_ids),
            self._upload(inputs.positions),
            self._upload(inputs.sampled_rows),
        )
        return self._model.forward(batch, layer_done)

    def _slots(self, spans: Sequence[Span]) -> Tensor:
        slots: list[int] = []
        for span in spans:
            for slot, _, num in slot_runs(span.block_table, range(span.start, span.end), self._block_size):
                slots.extend(range(slot, slot + num))
        return torch.tensor(slots)

    def _upload(self, array: Int64s) -> Tensor:
        return torch.from_numpy(array).to(self._device)
