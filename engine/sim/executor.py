"""Computes nothing: sleeps for as long as a model would take, stamps the KV, draws deterministic tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVLayout
from kvrelay.core.request import TokenLogprobs, TokenRequest
from kvrelay.engine.executor import DrawFailed, DrawnToken, LayerDone
from kvrelay.engine.host_kv import HostKVStore, slot_runs
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.sequence import Chunk, LiveSequence
from kvrelay.engine.sim.stamps import STAMP_BYTES, PrefixStamps, UInt64s, draw_token, stream_of
from kvrelay.engine.sim.timing import SimTiming

Sleep = Callable[[float], None]
"""Waits that many seconds, of real or of virtual time."""


@dataclass(slots=True)
class _Progress:
    """Rolling hash over a sequence's first `num_tokens` tokens; `stream` names what it will draw."""

    stream: int
    num_tokens: int
    rolling: int


class SimExecutor:
    """See `kvrelay.engine.executor.Executor`. A stamp each for K and V: 16 bytes a token and layer."""

    def __init__(
        self,
        layout: KVLayout,
        timing: SimTiming,
        sleep: Sleep,
        *,
        vocab_size: int,
        max_model_len: int,
        num_host_blocks: int = 0,
    ) -> None:
        assert layout.token_bytes_per_layer == 2 * STAMP_BYTES
        num_slots = layout.num_blocks * layout.block_size
        self._cache: UInt64s = np.zeros((layout.num_layers, 2, num_slots), dtype=np.uint64)
        cache_bytes = self._cache.view(np.uint8).reshape(layout.num_layers, 2, num_slots, STAMP_BYTES)
        self._kv = HostKVStore(layout, cache_bytes)
        self._blocks = self._cache.reshape(layout.num_layers, 2, layout.num_blocks, layout.block_size)
        host_shape = (num_host_blocks, layout.num_layers, 2, layout.block_size)
        self._host_blocks: UInt64s = np.zeros(host_shape, dtype=np.uint64)
        self._block_size = layout.block_size
        self._timing = timing
        self._sleep = sleep
        self._vocab_size = vocab_size
        self._stamps = PrefixStamps(max_model_len, layout.num_layers)

    @property
    def kv(self) -> HostKVStore:
        return self._kv

    def prepare_thread(self) -> None:
        return

    def prepare(self, request: TokenRequest) -> object:
        for name in ("grammar", "logit_bias"):
            if getattr(request.sampling, name):
                raise InvalidRequest(
                    f"sampling.{name} needs logits, which the sim engine has not", field=f"sampling.{name}"
                )
        return None

    def execute(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        self._stamp_single_tokens([chunk for chunk in chunks if chunk.num_tokens == 1])
        for chunk in chunks:
            if chunk.num_tokens > 1:
                self._stamp_many_tokens(chunk)
        self._pass_time(self._timing.step_s(chunks), layer_done)
        return [self._draw(chunk.sequence) for chunk in chunks if chunk.samples]

    def move_blocks(self, copies: Sequence[BlockCopy], *, before_receive: bool) -> None:
        """Takes no modelled time."""
        for block, slot, to_host in copies:
            if to_host:
                self._host_blocks[slot] = self._blocks[:, :, block]
            else:
                self._blocks[:, :, block] = self._host_blocks[slot]

    def reveal_restored(self) -> None:
        return

    def check_received(self, token_ids: Sequence[int], block_table: Sequence[BlockId]) -> str | None:
        expected = self._stamps.stamps(self._stamps.prefix_sums(token_ids))
        num_tokens = len(token_ids)
        for slot, offset, num in slot_runs(block_table, range(num_tokens), self._block_size):
            if not np.array_equal(
                self._cache[:, :, slot : slot + num], expected[:, :, offset : offset + num]
            ):
                return f"wrong KV received within tokens [{offset}, {offset + num}) of {num_tokens}"
        return None

    def _stamp_single_tokens(self, chunks: Sequence[Chunk]) -> None:
        if not chunks:
            return
        sums: list[int] = []
        slots: list[int] = []
        block_size, next_sum = self._block_size, self._stamps.next_sum
        for chunk in chunks:
            sequence, position = chunk.sequence, chunk.start
            progress = self._progress_at(sequence, position)
            progress.rolling = next_sum(sequence.token_ids[position], position, progress.rolling)
            progress.num_tokens = position + 1
            sums.append(progress.rolling)
            slots.append(sequence.block_table[position // block_size] * block_size + position % block_size)
        self._cache[:, :, slots] = self._stamps.stamps(np.array(sums, dtype=np.uint64))

    def _stamp_many_tokens(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        progress = self._progress_at(sequence, chunk.start)
        token_ids = sequence.token_ids[chunk.start : chunk.end]
        sums = self._stamps.prefix_sums(token_ids, chunk.start, progress.rolling)
        progress.rolling, progress.num_tokens = int(sums[-1]), chunk.end
        stamps = self._stamps.stamps(sums)
        tokens = range(chunk.start, chunk.end)
        for slot, offset, num in slot_runs(sequence.block_table, tokens, self._block_size):
            self._cache[:, :, slot : slot + num] = stamps[:, :, offset : offset + num]

    def _progress_at(self, sequence: LiveSequence, num_tokens: int) -> _Progress:
        """The sequence's rolling hash over its first `num_tokens` tokens."""
        progress = sequence.executor_state
        if not isinstance(progress, _Progress):
            sampling = sequence.request.sampling
            prompt_hash = self._rolling(sequence.token_ids[: sequence.request.num_prompt_tokens])
            seed = 0 if sampling.is_greedy else (sampling.seed or 0)
            progress = sequence.executor_state = _Progress(stream_of(prompt_hash, seed), 0, 0)
        if progress.num_tokens != num_tokens:
            progress.num_tokens = num_tokens
            progress.rolling = self._rolling(sequence.token_ids[:num_tokens])
        return progress

    def _rolling(self, token_ids: Sequence[int]) -> int:
        return int(self._stamps.prefix_sums(token_ids)[-1]) if token_ids else 0

    def _pass_time(self, step_s: float, layer_done: LayerDone | None) -> None:
        if layer_done is None:
            self._sleep(step_s)
            return
        num_layers = self._kv.layout.num_layers
        for layer in range(num_layers):
            self._sleep(step_s / num_layers)
            layer_done(layer)

    def _draw(self, sequence: LiveSequence) -> DrawnToken | DrawFailed:
        progress = sequence.executor_state
        assert isinstance(progress, _Progress)
        sampling = sequence.request.sampling
        ends = sampling.stop_token_ids if sequence.num_output_tokens < sampling.min_tokens else ()
        token_id = draw_token(progress.stream, len(sequence.token_ids), self._vocab_size, ends)
        if token_id is None:
            return DrawFailed("sampling.min_tokens leaves no token to draw", "sampling.min_tokens")
        num_logprobs = sampling.num_logprobs
        if num_logprobs is None:
            return DrawnToken(token_id)
        top = ((token_id, 0.0),) if num_logprobs else ()
        return DrawnToken(token_id, TokenLogprobs(0.0, top))
