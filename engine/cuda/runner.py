"""Runs steps on CUDA: decode steps as graphs, prefill and mixed steps one kernel after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVStore
from kvrelay.core.request import TokenRequest
from kvrelay.engine.cuda.copy_stream import Mark
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.engine.cuda.plain_draw import PreparedDraw, drawn_tokens, is_plain
from kvrelay.engine.cuda.prefill_step import PrefillStep
from kvrelay.engine.executor import DrawFailed, DrawnToken, Launched, LayerDone
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.sequence import Chunk

if TYPE_CHECKING:  # they need Triton
    from kvrelay.engine.cuda.decode_graphs import DecodeGraphs, GraphStep


class CudaRunner:
    """See `kvrelay.engine.executor.AheadExecutor`."""

    def __init__(
        self,
        eager: ModelRunner,
        graphs: DecodeGraphs,
        kv: CudaKVStore,
        read_clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._eager = eager
        self._graphs = graphs
        self._sampler = graphs.sampler
        self._kv = kv
        self._read_clock = read_clock
        self._has_moved_blocks = False
        self._restored: Mark | None = None
        self._latest: PrefillStep | None = None

    @property
    def kv(self) -> KVStore:
        return self._kv

    def prepare_thread(self) -> None:
        self._eager.prepare_thread()

    def prepare(self, request: TokenRequest) -> object:
        return self._eager.prepare(request)

    def move_blocks(self, copies: Sequence[BlockCopy], *, before_receive: bool) -> None:
        """Scatters learn of the copies only here: told of each, they would wait for every decode step."""
        self._eager.move_blocks(copies, before_receive=before_receive)
        self._has_moved_blocks |= bool(copies)
        if not all(copy.to_host for copy in copies):
            self._restored = self._kv.mark()
        if before_receive and self._has_moved_blocks:
            self._kv.mark_freed()
            self._has_moved_blocks = False

    def reveal_restored(self) -> None:
        """Gathers learn of the copies only here: told of them while a step before is under way, its own
        layers' gathers would wait for its end."""
        if self._restored is not None:
            self._kv.mark_written(at=self._restored)
            self._restored = None

    def check_received(self, token_ids: Sequence[int], block_table: Sequence[BlockId]) -> str | None:
        return self._eager.check_received(token_ids, block_table)

    def can_launch(self, chunks: Sequence[Chunk]) -> bool:
        if not all(is_plain(chunk.sequence) for chunk in chunks if chunk.samples):
            return False
        if all(chunk.is_prefill for chunk in chunks):
            return bool(chunks)
        return self._fits_graph(chunks) and not any(chunk.is_prefill for chunk in chunks)

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk], layer_done: LayerDone | None) -> Launched:
        if chunks[0].is_prefill:
            step, _ = self._queue(chunks, layer_done, watches_layers=True)
            return step
        return DecodeStep(chunks, self._graphs.launch(chunks))

    @torch.inference_mode()
    def execute(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        if layer_done is None and self._fits_graph(chunks):
            step = self._graphs.launch(chunks)
            rows = torch.tensor(step.rows, device=step.logits.device)
            return self._eager.draw(step.logits[rows], chunks)
        return self._execute_eagerly(chunks, layer_done)

    def _execute_eagerly(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        step, logits = self._queue(chunks, layer_done, watches_layers=layer_done is not None)
        while not step.advance():
            pass
        drawn = step.results()
        sampled = [chunk for chunk in chunks if chunk.samples]
        return drawn if len(drawn) == len(sampled) else self._eager.draw(logits, sampled)

    def _queue(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None, *, watches_layers: bool
    ) -> tuple[PrefillStep, Tensor]:
        """Queue a whole step, and its draw where the device can do it; returns its logits, too. Meanwhile
        the layers of the one before it are reported."""
        step = PrefillStep(chunks, layer_done, self._kv.mark, self._read_clock)
        before, self._latest = self._latest, step

        def layer_queued(layer: int) -> None:
            step.layer_queued()
            if before is not None:
                before.report_passed()

        sampled = [chunk for chunk in chunks if chunk.samples]
        draw: PreparedDraw | None = None
        if sampled and all(is_plain(chunk.sequence) for chunk in sampled):
            draw = self._sampler.prepare(sampled)
        logits = self._eager.forward(chunks, layer_queued if watches_layers else None)
        if draw is not None:
            self._sampler.draw(logits, draw.keys, draw.temperatures, draw.token_ids, draw.best)
            draw.fetch()
        step.queued(None if draw is None else draw.read)
        return step, logits

    def _fits_graph(self, chunks: Sequence[Chunk]) -> bool:
        return 0 < len(chunks) <= self._graphs.max_rows and all(
            chunk.num_tokens == 1 and chunk.samples for chunk in chunks
        )


class DecodeStep:
    """A decode step: see `kvrelay.engine.executor.Launched`."""

    def __init__(self, chunks: Sequence[Chunk], step: GraphStep) -> None:
        self.chunks = chunks
        self._step = step

    def has_time(self) -> bool:
        """A graph is launched in no time."""
        return True

    def advance(self) -> bool:
        return True

    def results(self) -> Sequence[DrawnToken | DrawFailed]:
        token_ids, best = self._step.wait()
        return drawn_tokens(token_ids, best)
