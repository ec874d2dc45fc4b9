"""Decode steps as CUDA graphs: one for each of a ladder of batch sizes, in one memory pool.

A captured step reads what is new of it (token, position, at most one new block a row) from one control block
that one copy brings to the device; block tables, and the tokens drawn last, stay there. So a step can be
launched before the host has seen the tokens of the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvrelay.core.ids import BlockId
from kvrelay.engine.cuda.attention import CudaAttention
from kvrelay.engine.cuda.decode_attention import DecodeInputs
from kvrelay.engine.cuda.kernels import begin_step_kernel, next_power_of_two
from kvrelay.engine.cuda.plain_draw import draw_key
from kvrelay.engine.cuda.sampler import CudaSampler
from kvrelay.engine.model.transformer import TokenBatch, Transformer
from kvrelay.engine.sequence import Chunk, LiveSequence

_TOKEN, _POSITION, _COLUMN, _BLOCK, _KEY, _TEMPERATURE = range(6)
_NUM_IN_FLIGHT: Final = 3
"""Steps whose host buffers may be in use: one that is read, one that runs, one that is being prepared."""


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: every row is padded to the next, so they lie closer where a row costs more."""
    ladder = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, 513, 32), *range(576, 4097, 64)]
    return [*(size for size in ladder if size < max_rows), max_rows]


@dataclass(slots=True)
class _HostBuffers:
    """Pinned memory of one step in flight."""

    control: Tensor
    token_ids: Tensor
    best: Tensor
    done: torch.cuda.Event


@dataclass(slots=True)
class _Row:
    """What the device has of one sequence's block table."""

    sequence: LiveSequence
    table: list[BlockId]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What a step of `size` rows needs, as plain data: `control` ``[6, size]`` int64, and the block tables
    ``[num_blocks]`` int32 of rows that can't have theirs from it."""

    size: int
    control: NDArray[np.int64]
    tables: Sequence[tuple[int, NDArray[np.int32]]]


Broadcast: TypeAlias = Callable[[GraphInputs], None]


@dataclass(frozen=True, slots=True)
class GraphStep:
    """A launched step. `rows[i]` is where chunk i's results are; `logits` ``[size, vocab_size]`` are good
    until the next launch."""

    rows: Sequence[int]
    logits: Tensor
    buffers: _HostBuffers

    def wait(self) -> tuple[list[int], list[float]]:
        """Token ids and largest logits, one a chunk."""
        self.buffers.done.synchronize()
        token_ids, best = self.buffers.token_ids.numpy(), self.buffers.best.numpy()
        index = np.asarray(self.rows)
        return token_ids[index].tolist(), best[index].tolist()


class DecodeGraphs:
    """For up to `max_rows` sequences of one model. `capture` comes first; all on one stream.

    With tensor parallelism every rank captures and replays the same; `broadcast` brings the inputs of what
    this one launches to the others.
    """

    def __init__(
        self,
        model: Transformer,
        attention: CudaAttention,
        device: torch.device,
        *,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        sampler: CudaSampler,
    ) -> None:
        self.max_rows = max_rows
        self.sampler = sampler
        self.broadcast: Broadcast | None = None
        self._model = model
        self._attention = attention
        self._block_size = block_size
        self._sizes = graph_sizes(max_rows)
        self._control = torch.full((6, max_rows), -1, dtype=torch.int64, device=device)
        self._tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._best = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self._token_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots = torch.full((max_rows,), -1, dtype=torch.int64, device=device)
        self._num_keys = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._rows: dict[int, _Row] = {}
        self._row_of: dict[int, int] = {}
        self._last_row_of: dict[int, int] = {}
        self._num_launched = 0
        self._host = [
            _HostBuffers(
                torch.empty((6, max_rows), dtype=torch.int64, pin_memory=True),
                torch.empty(max_rows, dtype=torch.int64, pin_memory=True),
                torch.empty(max_rows, dtype=torch.float32, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(_NUM_IN_FLIGHT)
        ]

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size, largest first, so that the smaller ones fit the pool's memory."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels and lets cuBLAS choose, outside the capture
                self._run(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Only what this thread does may not wait for the device: NCCL's own thread looks after its work.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._run(size)
            self._graphs[size] = (graph, logits)
        torch.cuda.synchronize()

    def launch(self, chunks: Sequence[Chunk]) -> GraphStep:
        """Queue a step of single tokens; those that the host does not know yet must come from the last
        launch."""
        size = next(size for size in self._sizes if size >= len(chunks))
        rows = self._assign_rows([chunk.sequence for chunk in chunks], size)
        inputs = self._inputs(chunks, rows, size)
        if self.broadcast is not None:
            self.broadcast(inputs)
        buffers, logits = self.replay(inputs)
        self._last_row_of = {id(chunk.sequence): row for chunk, row in zip(chunks, rows, strict=True)}
        return GraphStep(rows, logits, buffers)

    @torch.inference_mode()
    def replay(self, inputs: GraphInputs) -> tuple[_HostBuffers, Tensor]:
        """Queue one step; returns where its tokens will be, and its logits ``[size, vocab_size]``."""
        buffers = self._host[self._num_launched % _NUM_IN_FLIGHT]
        self._num_launched += 1
        buffers.done.synchronize()
        buffers.control.numpy()[:, : inputs.size] = inputs.control
        for row, table in inputs.tables:
            # Pinned, or the copy would wait for the step that is under way.
            self._tables[row, : len(table)].copy_(torch.from_numpy(table).pin_memory(), non_blocking=True)
        self._control.copy_(buffers.control, non_blocking=True)
        graph, logits = self._graphs[inputs.size]
        graph.replay()
        buffers.token_ids.copy_(self._last_tokens, non_blocking=True)
        buffers.best.copy_(self._best, non_blocking=True)
        buffers.done.record()
        return buffers, logits

    def _inputs(self, chunks: Sequence[Chunk], rows: Sequence[int], size: int) -> GraphInputs:
        control = np.zeros((6, size), dtype=np.int64)
        control[_POSITION] = control[_COLUMN] = -1
        columns, values, tables = self._new_blocks(rows, chunks)
        control[:, rows] = [
            [self._token_of(chunk) for chunk in chunks],
            [chunk.start for chunk in chunks],
            columns,
            values,
            [draw_key(chunk) for chunk in chunks],
            [0] * len(chunks),
        ]
        control[_TEMPERATURE].view(np.float64)[rows] = [
            chunk.sequence.request.sampling.temperature for chunk in chunks
        ]
        return GraphInputs(size, control, tables)

    def _run(self, size: int) -> Tensor:
        begin_step_kernel[(1,)](
            self._control,
            self._tables,
            self._last_tokens,
            self._token_ids,
            self._positions,
            self._slots,
            self._num_keys,
            self._tables.stride(0),
            self._control.stride(0),
            size,
            BLOCK_SIZE=self._block_size,
            BLOCK=next_power_of_two(size),
        )
        self._attention.begin_decode(DecodeInputs(size, self._tables, self._num_keys), self._slots[:size])
        logits = self._model.forward(TokenBatch(self._token_ids[:size], self._positions[:size], None), None)
        self.sampler.draw(
            logits,
            self._control[_KEY],
            self._control[_TEMPERATURE].view(torch.float64),
            self._last_tokens,
            self._best,
        )
        return logits

    def _token_of(self, chunk: Chunk) -> int:
        known = chunk.sequence.token_ids
        return known[chunk.start] if chunk.start < len(known) else -1 - self._last_row_of[id(chunk.sequence)]

    def _assign_rows(self, sequences: Sequence[LiveSequence], size: int) -> list[int]:
        """A sequence keeps its row while it is in every step, so that its block table stays there too."""
        wanted = {id(sequence) for sequence in sequences}
        for row, held in list(self._rows.items()):
            if row >= size or id(held.sequence) not in wanted:
                del self._rows[row], self._row_of[id(held.sequence)]
        free = iter([row for row in range(size) if row not in self._rows])
        rows = []
        for sequence in sequences:
            if id(sequence) not in self._row_of:
                row = self._row_of[id(sequence)] = next(free)
                self._rows[row] = _Row(sequence, [], 0)
            rows.append(self._row_of[id(sequence)])
        return rows

    def _new_blocks(
        self, rows: Sequence[int], chunks: Sequence[Chunk]
    ) -> tuple[list[int], list[int], list[tuple[int, NDArray[np.int32]]]]:
        """Columns and values of blocks that the control block brings; tables that have to come whole."""
        columns, values = [-1] * len(rows), [0] * len(rows)
        tables: list[tuple[int, NDArray[np.int32]]] = []
        for index, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            held, table = self._rows[row], chunk.sequence.block_table
            if held.table is table and held.num_blocks == len(table):
                continue
            if held.table is table and held.num_blocks + 1 == len(table):
                columns[index], values[index] = held.num_blocks, table[-1]
            else:
                tables.append((row, np.array(table, dtype=np.int32)))
            held.table, held.num_blocks = table, len(table)
        return columns, values, tables
