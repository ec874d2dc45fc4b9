"""Runs steps on CUDA: decode steps as graphs, prefill and mixed steps one kernel after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrelay.core.kv import KVStore
from kvrelay.core.request import TokenRequest
from kvrelay.engine.cuda.copy_stream import Mark
from kvrelay.engine.cuda.decode_graphs import DecodeGraphs, GraphStep
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.engine.cuda.sampler import PreparedDraw, drawn_tokens, is_plain
from kvrelay.engine.executor import DrawFailed, DrawnToken, LayerDone
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.sequence import Chunk, LiveSequence


class CudaRunner:
    """See `kvrelay.engine.executor.AheadExecutor`."""

    def __init__(self, eager: ModelRunner, graphs: DecodeGraphs, kv: CudaKVStore) -> None:
        self._eager = eager
        self._graphs = graphs
        self._sampler = graphs.sampler
        self._kv = kv
        self._has_moved_blocks = False

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
            self._kv.mark_written()
        if before_receive and self._has_moved_blocks:
            self._kv.mark_freed()
            self._has_moved_blocks = False

    def check_received(self, sequence: LiveSequence) -> str | None:
        return self._eager.check_received(sequence)

    def can_launch(self, chunks: Sequence[Chunk]) -> bool:
        return self._fits_graph(chunks) and all(is_plain(chunk.sequence) for chunk in chunks)

    def launch(self, chunks: Sequence[Chunk]) -> LaunchedStep:
        with torch.inference_mode():
            return LaunchedStep(chunks, self._graphs.launch(chunks))

    def execute(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        if layer_done is None and self._fits_graph(chunks):
            with torch.inference_mode():
                step = self._graphs.launch(chunks)
                rows = torch.tensor(step.rows, device=step.logits.device)
                return self._eager.draw(step.logits[rows], chunks)
        return self._execute_eagerly(chunks, layer_done)

    @torch.inference_mode()
    def _execute_eagerly(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        """Queue everything first; then, while the device computes, announce each layer as it is done."""
        progress = None if layer_done is None else _LayerProgress(self._kv, layer_done)
        sampled = [chunk for chunk in chunks if chunk.samples]
        draw: PreparedDraw | None = None
        if sampled and all(is_plain(chunk.sequence) for chunk in sampled):
            draw = self._sampler.prepare(sampled)
        logits = self._eager.forward(chunks, None if progress is None else progress.layer_queued)
        if draw is not None:
            self._sampler.draw(logits, draw.keys, draw.temperatures, draw.token_ids, draw.best)
        if progress is not None:
            progress.wait()
        self._kv.mark_freed()  # a step that draws nothing may still be under way
        if draw is not None:
            return draw.wait()
        return self._eager.draw(logits, sampled) if sampled else []

    def _fits_graph(self, chunks: Sequence[Chunk]) -> bool:
        return 0 < len(chunks) <= self._graphs.max_rows and all(
            chunk.num_tokens == 1 and chunk.samples for chunk in chunks
        )


class _LayerProgress:
    """Announces layers once the device has computed them.

    Announced when they are queued, they would be gathered up to a whole forward pass too early, and the
    transfer thread would wait for the device instead of serving its other transfers.
    """

    def __init__(self, kv: CudaKVStore, layer_done: LayerDone) -> None:
        self._kv = kv
        self._layer_done = layer_done
        self._marks: list[Mark] = []

    def layer_queued(self, layer: int) -> None:
        """Announces nothing yet, though the device may be done with the first layers: the transfer thread
        would take the interpreter from this one while it still queues, and the device run dry."""
        self._marks.append(self._kv.mark_written(range(layer, layer + 1)))

    def wait(self) -> None:
        """Once all is queued: return when the last layer is announced."""
        for layer, mark in enumerate(self._marks):
            mark.synchronize()
            self._layer_done(layer)


class LaunchedStep:
    """See `kvrelay.engine.executor.Launched`."""

    def __init__(self, chunks: Sequence[Chunk], step: GraphStep) -> None:
        self.chunks = chunks
        self._step = step

    def results(self) -> Sequence[DrawnToken | DrawFailed]:
        token_ids, best = self._step.wait()
        return drawn_tokens(token_ids, best)
