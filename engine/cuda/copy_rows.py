"""The Triton kernel of `copy_kernels`; importing this needs Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "num_slots", "first_token"])
def copy_rows(  # type: ignore[no-untyped-def]
    planes,
    message,
    table,
    num_rows,
    num_slots,
    first_token,
    BLOCK_SIZE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    MESSAGE_ROW_WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    IS_GATHER: tl.constexpr,
):
    """Program (i, p, j): rows ``i * TILE_ROWS ..`` of plane p, words ``j * TILE_WORDS ..`` of each.

    Offsets are multiples of ROW_WORDS in plain sight, so that Triton moves 16 bytes a thread at a time.
    """
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    plane = tl.program_id(1).to(tl.int64)
    words = tl.program_id(2) * TILE_WORDS + tl.arange(0, TILE_WORDS)
    is_row = rows < num_rows
    tokens = first_token + rows
    block = tl.load(table + tokens // BLOCK_SIZE, mask=is_row, other=0)
    slot = block * BLOCK_SIZE + tokens % BLOCK_SIZE
    is_inside = is_row[:, None] & (words < ROW_WORDS)[None, :]
    at_plane = planes + (plane * num_slots + slot[:, None]) * ROW_WORDS + words[None, :]
    at_message = message + (plane * num_rows + rows[:, None]) * MESSAGE_ROW_WORDS + words[None, :]
    if IS_GATHER:
        tl.store(at_message, tl.load(at_plane, mask=is_inside), mask=is_inside)
    else:
        tl.store(at_plane, tl.load(at_message, mask=is_inside), mask=is_inside)
