"""Triton kernel that merges attention over two sets of keys; importing this needs Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["earlier_lse_stride", "lse_stride"])
def merge_attended_kernel(  # type: ignore[no-untyped-def]
    earlier,
    attended,
    earlier_lse,
    lse,
    earlier_lse_stride,
    lse_stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """Program i: row i of `earlier` and `attended` ``[num_rows, HEADS, DIM]``, weighted by the exponentials
    of their softmax sums ``[HEADS, *]``, into `attended` and `lse`."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    is_head = heads < HEADS
    at_lse = lse + heads * lse_stride.to(tl.int64) + row
    earlier_sum = tl.load(
        earlier_lse + heads * earlier_lse_stride.to(tl.int64) + row, mask=is_head, other=0.0
    )
    own_sum = tl.load(at_lse, mask=is_head, other=0.0)
    highest = tl.maximum(earlier_sum, own_sum)
    merged_sum = highest + tl.log(tl.exp(earlier_sum - highest) + tl.exp(own_sum - highest))
    weight = tl.exp(earlier_sum - merged_sum)[:, None]
    own_weight = tl.exp(own_sum - merged_sum)[:, None]
    at = (row * HEADS + heads[:, None]) * DIM + dims[None, :]
    inside = is_head[:, None] & (dims < DIM)[None, :]
    one = tl.load(earlier + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(attended + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(attended + at, (one * weight + other * own_weight).to(attended.dtype.element_ty), mask=inside)
    tl.store(at_lse, merged_sum, mask=is_head)
