"""Turns planned chunks into one batch for the model, and its logits into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVStore
from kvrelay.core.request import TokenRequest
from kvrelay.engine.block_mover import BlockMover
from kvrelay.engine.executor import DrawFailed, DrawnToken, LayerDone
from kvrelay.engine.forward_pass import ForwardPass, StepInputs, step_inputs
from kvrelay.engine.grammar import GrammarCompiler
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.sampler import DrawRequest, draw
from kvrelay.engine.sequence import Chunk, LiveSequence
from kvrelay.engine.token_mask import allowed_tokens

Broadcast: TypeAlias = Callable[[StepInputs | tuple[BlockCopy, ...]], None]


class ModelRunner:
    """See `kvrelay.engine.executor.Executor`. `broadcast` brings steps' inputs to the other ranks."""

    def __init__(
        self,
        forward_pass: ForwardPass,
        kv: KVStore,
        grammars: GrammarCompiler,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        mover: BlockMover | None = None,
        broadcast: Broadcast | None = None,
    ) -> None:
        self._forward_pass = forward_pass
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._kv = kv
        self._mover = mover
        self._broadcast = broadcast

    @property
    def kv(self) -> KVStore:
        return self._kv

    def prepare_thread(self) -> None:
        self._forward_pass.prepare_thread()

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
        inputs = step_inputs(chunks)
        if self._broadcast is not None:
            self._broadcast(inputs)
        return self._forward_pass.run(inputs, layer_done)

    def draw(self, logits: Tensor, chunks: Sequence[Chunk]) -> list[DrawnToken | DrawFailed]:
        """The next token of each chunk, from its row of `logits` ``[len(chunks), vocab_size]``."""
        return draw(logits.float(), [self._draw_request(chunk.sequence) for chunk in chunks])

    def move_blocks(self, copies: Sequence[BlockCopy], *, before_receive: bool) -> None:
        assert self._mover is not None, "there is no host tier"
        if self._broadcast is not None:
            self._broadcast(tuple(copies))
        self._mover.move(copies)

    def reveal_restored(self) -> None:
        return

    def check_received(self, token_ids: Sequence[int], block_table: Sequence[BlockId]) -> str | None:
        return None

    def _draw_request(self, sequence: LiveSequence) -> DrawRequest:
        request = sequence.request
        allowed: Tensor | DrawFailed | None
        try:
            allowed = allowed_tokens(sequence, self._eos_token_ids, self._vocab_size)
        except InvalidRequest as error:
            allowed = DrawFailed(error.message, error.field or "")
        return DrawRequest(request.sampling, sequence.token_ids, request.num_prompt_tokens, allowed)
