"""Attention of one prefill chunk: over its own keys, and over those before it.

On Hopper cuDNN's kernels take half the time of FlashAttention 2, which PyTorch has besides. But cuDNN makes
a plan for each pair of lengths, in some 60 ms and for each thread anew, and knows no causal mask that ends at
the lower right, as a later chunk needs it. So lengths are padded to a short ladder, whose plans are made
before the first request; a later chunk attends to itself causally and to what lies before it piece by piece
without a mask, and the parts are merged by their softmax sums. FlashAttention takes what is short or odd. An
H100, Llama-3.1-8B's heads, 8,192 queries over 32,768 keys: 10.8 ms by FlashAttention, 5.9 so (2026-11-27).

A plan holds for one way of lying in memory, too, and is made for queries, keys and values as the model's one
product for all three leaves them. So a chunk of a planned length is attended to where it lies.
"""

from __future__ import annotations

import logging
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from kvrelay.engine.cuda.attention_lengths import LADDER_FROM, ladder, padded_length, pieces
from kvrelay.engine.cuda.chunk_padding import ChunkPadding, ChunkRows
from kvrelay.engine.cuda.kernels import next_power_of_two
from kvrelay.engine.cuda.merge_kernel import merge_attended_kernel

_QUERY_PIECES: Final = (8192, 4096, 2048, 1024, 512, 256)
_KEY_PIECES: Final = (16384, 8192, 4096, 2048, 1024)
_TOLERANCE: Final = 0.03

# torch's own bindings take the CPU less than ``torch.ops.aten``, which looks for the overload at each call.
_cudnn_attention: Final[Any] = torch._scaled_dot_product_cudnn_attention
_flash_attention: Final[Any] = torch._scaled_dot_product_flash_attention

_log = logging.getLogger(__name__)


class Attended(NamedTuple):
    """`rows` ``[num_queries, num_heads, head_dim]``, contiguous; `lse` ``[num_heads, >= num_queries]``
    float32: the logarithms of the softmax sums."""

    rows: Tensor
    lse: Tensor


class PrefillAttention:
    """For queries ``[num_queries, num_heads, head_dim]`` and keys and values ``[num_keys, num_kv_heads,
    head_dim]`` of one sequence, in `dtype` on `device`. Results have the queries' shape."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._kv_shape = (num_kv_heads, head_dim)
        self._device = device
        capability = torch.cuda.get_device_capability(device)
        self._has_flash = (
            dtype is torch.bfloat16
            and head_dim % 8 == 0
            and capability >= (8, 0)
            and torch.backends.cuda.is_flash_attention_available()
        )
        self._padding = ChunkPadding(num_heads, num_kv_heads, head_dim, dtype, device)
        self.uses_cudnn = (
            self._has_flash
            and capability >= (9, 0)
            and _cudnn_works(self._padding.draw(LADDER_FROM), *self._draw_earlier(_KEY_PIECES[-1]))
        )

    def prepare_thread(self, max_queries: int, max_keys: int) -> None:
        """Make the calling thread's plans for chunks of up to `max_queries` in sequences of `max_keys`."""
        if not self.uses_cudnn:
            return
        for length in ladder(max_queries):
            _cudnn(*self._padding.draw(length), is_causal=True)
        for num_keys in _KEY_PIECES:
            for num_queries in _QUERY_PIECES:
                if num_keys < max_keys and num_queries < 2 * max_queries:
                    queries = self._padding.draw(num_queries).queries
                    _cudnn(queries, *self._draw_earlier(num_keys), is_causal=False)
        torch.cuda.synchronize(self._device)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Query i sees keys up to ``num_keys - num_queries + i``."""
        num_queries = queries.shape[0]
        if self.uses_cudnn and num_queries == keys.shape[0] >= LADDER_FROM:
            padded = self._padding.pad(ChunkRows(queries, keys, values), padded_length(num_queries))
            return self._causal(padded, num_queries).rows
        if self._has_flash:
            return _flash(queries, keys, values).rows
        mask: Tensor | None = None
        if len(keys) != len(queries):
            whole = torch.ones((len(queries), len(keys)), dtype=torch.bool, device=queries.device)
            mask = whole.tril_(len(keys) - len(queries))
        attended = F.scaled_dot_product_attention(
            _heads_first(queries),
            _heads_first(keys),
            _heads_first(values),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return attended.squeeze(0).transpose(0, 1)

    def attend_after(
        self, queries: Tensor, keys: Tensor, values: Tensor, earlier_keys: Tensor, earlier_values: Tensor
    ) -> Tensor:
        """Query i sees all earlier keys, and its own chunk's up to i; earlier keys are contiguous."""
        num_queries, num_earlier = len(queries), len(earlier_keys)
        num_whole = num_earlier - num_earlier % _KEY_PIECES[-1] if self.uses_cudnn else 0
        chunk = ChunkRows(queries, keys, values)
        length = -(-num_queries // _QUERY_PIECES[-1]) * _QUERY_PIECES[-1]
        if num_whole and num_whole == num_earlier and num_queries >= LADDER_FROM:
            padded = self._padding.pad(chunk, max(length, padded_length(num_queries)))
            own = self._causal(padded.first(padded_length(num_queries)), num_queries)
        else:
            keys = torch.cat((earlier_keys[num_whole:], keys))
            values = torch.cat((earlier_values[num_whole:], values))
            if not num_whole:
                return self.attend(queries, keys, values)
            padded = self._padding.pad(chunk, length)
            own = _flash(queries, keys, values)
        for keys_at in pieces(num_whole, _KEY_PIECES):
            for queries_at in pieces(length, _QUERY_PIECES):
                part = _cudnn(
                    padded.queries[queries_at],
                    earlier_keys[keys_at],
                    earlier_values[keys_at],
                    is_causal=False,
                )
                _merge(own, queries_at.start, part)
        return own.rows

    def _causal(self, padded: ChunkRows, num_rows: int) -> Attended:
        """Of the first `num_rows`: the padding comes after every query that counts."""
        found = _cudnn(*padded, is_causal=True)
        return Attended(found.rows[:num_rows], found.lse)

    def _draw_earlier(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """Keys and values out of the air, as they come from the cache."""
        shape = (num_keys, *self._kv_shape)
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=self._device) for _ in range(2))
        return keys, values


def _heads_first(rows: Tensor) -> Tensor:
    return rows.transpose(0, 1).unsqueeze(0)


def _cudnn(queries: Tensor, keys: Tensor, values: Tensor, *, is_causal: bool) -> Attended:
    found = _cudnn_attention(
        _heads_first(queries), _heads_first(keys), _heads_first(values), None, True, 0.0, is_causal, False
    )
    return Attended(found[0].squeeze(0).transpose(0, 1).contiguous(), found[1].view(queries.shape[1], -1))


def _flash(queries: Tensor, keys: Tensor, values: Tensor) -> Attended:
    """Causal, the mask ending at the lower right."""
    found = _flash_attention(
        _heads_first(queries), _heads_first(keys), _heads_first(values), 0.0, True, False
    )
    return Attended(found[0].squeeze(0).transpose(0, 1).contiguous(), found[1].squeeze(0))


def _merge(own: Attended, start: int, part: Attended) -> None:
    """Attention of queries from `start` on to further keys, into `own`; the rest of `part` is padding."""
    rows = own.rows[start : start + len(part.rows)]
    if not len(rows):
        return
    _, num_heads, head_dim = rows.shape
    merge_attended_kernel[(len(rows),)](
        part.rows,
        rows,
        part.lse,
        own.lse[:, start:],
        part.lse.stride(0),
        own.lse.stride(0),
        HEADS=num_heads,
        HEADS_BLOCK=next_power_of_two(num_heads),
        DIM=head_dim,
        DIM_BLOCK=next_power_of_two(head_dim),
        num_warps=8,
    )


def _cudnn_works(chunk: ChunkRows, earlier_keys: Tensor, earlier_values: Tensor) -> bool:
    """Whether cuDNN takes such heads here, and gives what FlashAttention gives: merged with its own result,
    and with FlashAttention's."""
    keys, values = torch.cat((earlier_keys, chunk.keys)), torch.cat((earlier_values, chunk.values))
    try:
        expected = _flash(chunk.queries, keys, values).rows.float()
        errors = []
        for own in (_cudnn(*chunk, is_causal=True), _flash(*chunk)):
            _merge(own, 0, _cudnn(chunk.queries, earlier_keys, earlier_values, is_causal=False))
            errors.append(float((own.rows.float() - expected).norm() / expected.norm()))
    except (RuntimeError, NotImplementedError) as reason:
        _log.warning("long prompts attend more slowly: cuDNN's attention fails here: %s", reason)
        return False
    is_right = all(error < _TOLERANCE for error in errors)
    if not is_right:
        _log.warning("long prompts attend more slowly: cuDNN's attention is off by %.3g and %.3g", *errors)
    return is_right
