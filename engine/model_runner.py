"""Turns planned chunks into one batch for the model, and its logits into tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.kv import KVStore
from kvrelay.core.request import TokenRequest
from kvrelay.engine.attention import Attention, Span
from kvrelay.engine.block_mover import BlockMover
from kvrelay.engine.grammar import GrammarCompiler
from kvrelay.engine.host_kv import slot_runs
from kvrelay.engine.host_tier import BlockCopy
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
        device: torch.device,
        mover: BlockMover | None = None,
    ) -> None:
        self._device = device
        self._model = model
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._attention = attention
        self._kv = kv
        self._mover = mover
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
        return self.draw(self.forward(chunks, layer_done), [chunk for chunk in chunks if chunk.samples])

    def forward(self, chunks: Sequence[Chunk], layer_done: LayerDone | None) -> Tensor:
        """Compute the chunks' KV; returns logits ``[chunks that sample, vocab_size]``, in their order."""
        ordered = sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)
        self._begin_attention(ordered)
        return self._model.forward(_token_batch(chunks, ordered, self._device), layer_done)

    def draw(self, logits: Tensor, chunks: Sequence[Chunk]) -> list[DrawnToken | DrawFailed]:
        """The next token of each chunk, from its row of `logits` ``[len(chunks), vocab_size]``."""
        return draw(logits.float(), [self._draw_request(chunk.sequence) for chunk in chunks])

    def move_blocks(self, copies: Sequence[BlockCopy], *, before_receive: bool) -> None:
        assert self._mover is not None, "there is no host tier"
        self._mover.move(copies)

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


def _token_batch(chunks: Sequence[Chunk], ordered: Sequence[Chunk], device: torch.device) -> TokenBatch:
    """Rows in the order of `ordered`, logits in that of `chunks`."""
    token_ids: list[int] = []
    positions: list[int] = []
    last_row: dict[int, int] = {}
    for chunk in ordered:
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        last_row[id(chunk)] = len(token_ids) - 1
    sampled_rows = [last_row[id(chunk)] for chunk in chunks if chunk.samples]
    return TokenBatch(
        torch.tensor(token_ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(sampled_rows, dtype=torch.int64, device=device),
    )
