"""Turns planned chunks into one batch for the model, and its logits into tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.kv import KVStore
from kvrelay.core.request import TokenRequest
from kvrelay.engine.attention import Attention, Span
from kvrelay.engine.grammar import GrammarCompiler
from kvrelay.engine.host_kv import slot_runs
from kvrelay.engine.model.transformer import TokenBatch, Transformer
from kvrelay.engine.paged_engine import DrawFailed, DrawnToken, LayerDone
from kvrelay.engine.sampler import DrawRequest, draw
from kvrelay.engine.sequence import Chunk, LiveSequence
from kvrelay.engine.token_mask import allowed_tokens


class ModelRunner:
    """See `kvrelay.engine.paged_engine.Executor`."""

    def __init__(
        self,
        model: Transformer,
        attention: Attention,
        kv: KVStore,
        grammars: GrammarCompiler,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._model = model
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._attention = attention
        self._kv = kv
        self._block_size = kv.layout.block_size

    @property
    def kv(self) -> KVStore:
        return self._kv

    def prepare(self, request: TokenRequest) -> object:
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        return self._grammars.start(grammar, request.token_ids[request.num_prompt_tokens :])

    @torch.inference_mode()
    def execute(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        order = sorted(range(len(chunks)), key=lambda index: chunks[index].num_tokens > 1)
        ordered = [chunks[index] for index in order]
        self._begin_attention(ordered)
        logits = self._model.forward(_token_batch(ordered), layer_done)
        drawn = draw(logits, [self._draw_request(chunk.sequence) for chunk in ordered if chunk.samples])
        sampled_order = [index for index in order if chunks[index].samples]
        return [
            result for _, result in sorted(zip(sampled_order, drawn, strict=True), key=lambda pair: pair[0])
        ]

    def check_received(self, sequence: LiveSequence) -> str | None:
        return None

    def _draw_request(self, sequence: LiveSequence) -> DrawRequest:
        request = sequence.request
        allowed: Tensor | DrawFailed | None
        try:
            allowed = allowed_tokens(sequence, self._eos_token_ids, self._vocab_size)
        except InvalidRequest as error:
            allowed = DrawFailed(error.message, error.field or "")
        return DrawRequest(request.sampling, sequence.token_ids, request.num_prompt_tokens, allowed)

    def _begin_attention(self, chunks: Sequence[Chunk]) -> None:
        spans = [Span(chunk.sequence.block_table, chunk.start, chunk.num_tokens) for chunk in chunks]
        slots: list[int] = []
        for span in spans:
            for slot, _, num in slot_runs(span.block_table, range(span.start, span.end), self._block_size):
                slots.extend(range(slot, slot + num))
        self._attention.begin(spans, torch.tensor(slots))


def _token_batch(chunks: Sequence[Chunk]) -> TokenBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    sampled_rows: list[int] = []
    for chunk in chunks:
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        if chunk.samples:
            sampled_rows.append(len(token_ids) - 1)
    return TokenBatch(
        torch.tensor(token_ids), torch.tensor(positions), torch.tensor(sampled_rows, dtype=torch.int64)
    )
