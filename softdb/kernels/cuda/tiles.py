"""Tiles of rows and scores, shared by the kernels in Triton.

The functions are compiled into the kernels that call them. Names in capitals are compile-time constants. A tile has
rows of a table or queries in its first dimension; columns from the width on are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "COSINE",
    "DOT",
    "L2",
    "find_visible",
    "hide",
    "inverse_norm",
    "load_tile",
    "multiply",
    "multiply_tiles",
    "square_distances",
]

# Kinds of metrics.
DOT = tl.constexpr(0)
COSINE = tl.constexpr(1)
L2 = tl.constexpr(2)

# A vector of smaller norm is divided by this number instead, as by torch.nn.functional.normalize.
MIN_NORM = tl.constexpr(1e-12)


@triton.jit
def find_visible(mask, place, inside, HAS_MASK: tl.constexpr):  # (C,), (C,) bool -> (C,) bool
    """Return which rows are inside of the table and visible."""
    visible = inside
    if HAS_MASK:
        visible = visible & (tl.load(mask + place, mask=inside, other=0) != 0)
    return visible


@triton.jit
def load_tile(  # -> (C, BLOCK)
    table, places, stride, visible, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr
):
    """Load rows of a table at int64 ``places``; zeros where they are not visible.

    A hidden row may hold NaN, so it is never loaded.
    """
    columns = tl.arange(0, BLOCK)
    wanted = visible[:, None]
    if WIDTH < BLOCK:
        wanted = wanted & (columns < WIDTH)[None, :]
    tile = tl.load(table + places[:, None] * stride + columns[None, :], mask=wanted, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def inverse_norm(keys):  # (C, d) -> (C,)
    """Compute 1 / ‖key‖ in float32."""
    wide = keys.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), MIN_NORM)


@triton.jit
def multiply(left, right, SPLIT: tl.constexpr, PRECISION: tl.constexpr):  # (m, w), (w, n) -> (m, n)
    """Compute ``left @ right`` with float32 sums.

    With ``SPLIT``, ``left`` is float32 and ``right`` is not: the product takes ``left`` as a sum of two numbers in the
    dtype of ``right``, which have twice the digits of one. For float16, whose exponents are few, each row of ``left``
    is divided by a power of two first, so that its numbers neither overflow nor vanish.
    """
    if SPLIT:
        if right.dtype == tl.float16:
            # Bits of a power of two, at least 2^-100, by which the largest number of a row is in [2^14, 2^15). The bits
            # of 2^n and 2^-n sum to 0x7F000000.
            largest = tl.max(tl.abs(left), 1).to(tl.int32, bitcast=True) & 0x7F800000
            bits = tl.maximum(largest - 0x07000000, 0x0D800000)
            left = left * (0x7F000000 - bits).to(tl.float32, bitcast=True)[:, None]
        high = left.to(right.dtype)
        low = (left - high.to(tl.float32)).to(right.dtype)
        product = tl.dot(high, right, tl.dot(low, right))
        if right.dtype == tl.float16:
            product = product * bits.to(tl.float32, bitcast=True)[:, None]
    else:
        product = tl.dot(left, right, input_precision=PRECISION)
    return product


@triton.jit
def multiply_rows(  # -> (b, C)
    left,
    left_place,
    left_stride,
    left_valid,
    right,
    right_place,
    right_stride,
    right_valid,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Multiply rows of two tables in float32, some columns at a time.

    See `softdb.kernels.cuda.launch.choose_chunk`.
    """
    total = tl.zeros((QUERIES, ROWS), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        inside = (columns < WIDTH)[None, :]
        left_pointers = left + left_place[:, None] * left_stride + columns[None, :]
        right_pointers = right + right_place[:, None] * right_stride + columns[None, :]
        left_tile = tl.load(left_pointers, mask=left_valid[:, None] & inside, other=0.0).to(tl.float32)
        right_tile = tl.load(right_pointers, mask=right_valid[:, None] & inside, other=0.0).to(tl.float32)
        total = tl.dot(left_tile, tl.trans(right_tile), total, input_precision="ieee")
    return total


@triton.jit
def multiply_tiles(  # -> (b, C)
    left,
    left_place,
    left_stride,
    left_valid,
    left_tile,
    right,
    right_place,
    right_stride,
    right_valid,
    right_tile,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply rows of two tables, by their tiles or some columns at a time.

    ``CHUNK`` is the number of columns, or 0 for whole tiles; see `softdb.kernels.cuda.launch.choose_chunk`. The
    compiler leaves out the load of a tile that is not used.
    """
    if CHUNK:
        product = multiply_rows(
            left,
            left_place,
            left_stride,
            left_valid,
            right,
            right_place,
            right_stride,
            right_valid,
            QUERIES,
            ROWS,
            WIDTH,
            CHUNK,
        )
    else:
        product = multiply(left_tile, tl.trans(right_tile), SPLIT, PRECISION)
    return product


@triton.jit
def square_distances(  # -> (b, C)
    query,
    place,
    valid,
    keys,
    row_place,
    stride,
    visible,
    center,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute squared distances of centered queries and keys, column by column.

    Differences keep the digits that an expansion into products would lose.
    """
    total = tl.zeros((QUERIES, ROWS), tl.float32)
    for column in range(WIDTH):
        left = tl.load(query + place * WIDTH + column, mask=valid, other=0.0)
        right = tl.load(keys + row_place * stride + column, mask=visible, other=0.0).to(tl.float32)
        difference = left[:, None] - (right - tl.load(center + column))[None, :]
        total += difference * difference
    return total


@triton.jit
def hide(scores, visible):  # (b, C), (C,) -> (b, C)
    """Set the scores of hidden rows to -inf."""
    return scores + tl.where(visible, 0.0, float("-inf"))[None, :]
