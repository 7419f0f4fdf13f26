"""Forward pass of an exact read in Triton.

Each program reads one split of the rows for one block of queries, with an online softmax as in
`softdb.kernels.blocks.exact`. A second kernel merges the splits. Even for one query, the number of splits is such that
every multiprocessor works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.cuda.launch import (
    LOG2_E,
    MIN_BLOCK,
    choose_chunk,
    count_blocks,
    count_splits,
    is_interpreted,
    pad_width,
    with_unit_stride,
)
from softdb.kernels.cuda.tiles import (
    COSINE,
    DOT,
    L2,
    find_visible,
    hide,
    inverse_norm,
    load_tile,
    multiply,
    multiply_tiles,
    square_distances,
)

__all__ = ["METRIC_KINDS", "ForwardBlocks", "Softmax", "is_low", "needs_upcast", "read_forward"]

# The kernels of dot and scaled_dot are the same, since queries are scaled before.
METRIC_KINDS = {"dot": DOT.value, "scaled_dot": DOT.value, "cosine": COSINE.value, "l2": L2.value}

LN_2 = tl.constexpr(math.log(2.0))

# Splits that a program of the merge loads at once.
MERGED_SPLITS = 16


class Softmax(NamedTuple):
    """Results of a forward pass.

    Attributes:
        values: Weighted mean of the values, (G B, dv), float32.
        lse: Log-sum-exp of the scores, (G B,).
        maximum: Largest score in units of log 2, (G B,); -inf for a query that sees no row.
        total: Sum of 2^(score − maximum), (G B,).
    """

    values: Tensor
    lse: Tensor
    maximum: Tensor
    total: Tensor


@dataclass(frozen=True)
class ForwardBlocks:
    """Sizes of a launch.

    Attributes:
        queries: Number of queries in a tile.
        rows: Number of rows in a tile.
        warps: Number of warps of a program.
        stages: Number of tiles that are loaded ahead.
        programs: Number of programs that a multiprocessor runs at once.
    """

    queries: int
    rows: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def choose(
        cls, queries: int, key_width: int, value_width: int, *, low: bool, is_split: bool = False
    ) -> ForwardBlocks:
        """Choose the sizes for a number of queries and padded widths.

        Args:
            queries: Number of queries of a group.
            key_width: Padded width of the keys.
            value_width: Padded width of the values.
            low: Whether products are in 16 bits rather than float32.
            is_split: Whether one operand of such a product is a sum of two tiles.
        """
        height = min(64, pad_width(queries))
        width = key_width + value_width
        if low:
            rows = 128 if width <= 128 else 64 if width <= 256 else 32
            if is_split:
                return cls(height, rows, 8 if height == 64 and width > 128 else 4, 3 if width <= 256 else 2, 2)
            height = 128 if queries > 64 and width <= 256 else height
            return cls(height, rows, 8 if height == 128 else 4, 3 if width <= 256 else 2, 2)
        if height == MIN_BLOCK:
            return cls(height, 64 if width <= 128 else 32, 4, *((3, 3) if width <= 256 else (2, 2)))
        return cls(height, 32, 8, 2, 2)


@triton.jit
def _read(
    query,
    keys,
    values,
    mask,
    center,
    rate,
    blend,
    lse,
    maximum,
    total,
    queries,
    rows,
    group_rows,
    key_stride,
    value_stride,
    mask_stride,
    query_blocks,
    splits,
    split_rows,
    scale,
    METRIC: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_QUERY: tl.constexpr,
    SPLIT_WEIGHTS: tl.constexpr,
    WIDE_VALUES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Read one split of the rows for one block of queries."""
    program = tl.program_id(0)
    split = program // query_blocks % splits
    group = (program // query_blocks // splits).to(tl.int64)
    number = program % query_blocks * QUERIES + tl.arange(0, QUERIES)
    valid = number < queries
    place = group * queries + number  # (QUERIES,) int64
    if METRIC == L2:
        factors = -scale * tl.load(rate + place, mask=valid, other=0.0)[:, None]
    else:
        operand = load_tile(query, place, KEY_WIDTH, valid, KEY_WIDTH, KEY_BLOCK, UPCAST)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    sums = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
    # Weights are at most 1. In float16 the smallest of them would vanish, which together may be many.
    is_scaled: tl.constexpr = values.dtype.element_ty == tl.float16 and not (SPLIT_WEIGHTS or WIDE_VALUES)
    weight_scale: tl.constexpr = 32768.0 if is_scaled else 1.0
    first = split * split_rows
    stop = tl.minimum(first + split_rows, rows)
    for start in range(first, stop, ROWS):
        row = start + tl.arange(0, ROWS)
        visible = find_visible(mask, group * mask_stride + row, row < stop, HAS_MASK)
        row_place = group * group_rows + row
        if METRIC == L2:
            scores = square_distances(
                query, place, valid, keys, row_place, key_stride, visible, center, QUERIES, ROWS, KEY_WIDTH
            )
            scores = scores * factors
        else:
            key = load_tile(keys, row_place, key_stride, visible, KEY_WIDTH, KEY_BLOCK, UPCAST)
            scores = multiply_tiles(
                query,
                place,
                KEY_WIDTH,
                valid,
                operand,
                keys,
                row_place,
                key_stride,
                visible,
                key,
                QUERIES,
                ROWS,
                KEY_WIDTH,
                CHUNK,
                SPLIT_QUERY,
                PRECISION,
            )
            if METRIC == COSINE:
                scores = scores * inverse_norm(key)[None, :]
            scores = scores * scale
        scores = hide(scores, visible)
        value = load_tile(values, row_place, value_stride, visible, VALUE_WIDTH, VALUE_BLOCK, UPCAST)
        after = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(after == float("-inf"), 0.0, after)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        sums = sums * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        if SPLIT_WEIGHTS or WIDE_VALUES:
            result += multiply(weights, value, SPLIT_WEIGHTS, PRECISION)
        else:
            result = tl.dot((weights * weight_scale).to(value.dtype), value, result)
        highest = after
    place = split.to(tl.int64) * queries * (tl.num_programs(0) // query_blocks // splits) + place
    safe = tl.where(sums == 0.0, 1.0, sums)
    result = result / (safe * weight_scale)[:, None]
    columns = tl.arange(0, VALUE_BLOCK)
    tl.store(
        blend + place[:, None] * VALUE_WIDTH + columns[None, :],
        result,
        mask=valid[:, None] & (columns < VALUE_WIDTH)[None, :],
    )
    tl.store(maximum + place, highest, mask=valid)
    tl.store(total + place, sums, mask=valid)
    tl.store(lse + place, (highest + tl.log2(safe)) * LN_2, mask=valid)


@triton.jit
def _merge(
    blend,
    lse,
    maximum,
    total,
    merged_blend,
    merged_lse,
    merged_maximum,
    merged_total,
    queries,
    splits,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merge the splits of one query."""
    place = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    found = split < splits
    maxima = tl.load(maximum + split * queries + place, mask=found, other=float("-inf"))
    highest = tl.max(maxima, 0)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    sums = tl.load(total + split * queries + place, mask=found, other=0.0)
    merged = tl.sum(sums * tl.exp2(maxima - finite), 0)
    safe = tl.where(merged == 0.0, 1.0, merged)
    columns = tl.arange(0, BLOCK)
    result = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, CHUNK):
        part = start + tl.arange(0, CHUNK)
        part_place = part * queries + place
        inside = part < splits
        weights = tl.load(total + part_place, mask=inside, other=0.0) * tl.exp2(
            tl.load(maximum + part_place, mask=inside, other=float("-inf")) - finite
        )
        tile = tl.load(
            blend + part_place[:, None] * WIDTH + columns[None, :],
            mask=inside[:, None] & (columns < WIDTH)[None, :],
            other=0.0,
        )
        result += tl.sum(tile * weights[:, None], 0)
    tl.store(merged_blend + place * WIDTH + columns, result / safe, mask=columns < WIDTH)
    tl.store(merged_maximum + place, highest)
    tl.store(merged_total + place, merged)
    tl.store(merged_lse + place, (highest + tl.log2(safe)) * LN_2)


def is_low(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor have 16 bits."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def needs_upcast(tensor: Tensor) -> bool:
    """Return whether kernels convert loaded tiles to float32.

    See `softdb.kernels.cuda.launch.is_interpreted`.
    """
    return is_interpreted() and tensor.dtype == torch.bfloat16


def read_forward(
    query: Tensor,  # (G B, d)
    keys: Tensor,  # (G N, d)
    values: Tensor,  # (G N, dv)
    metric: str,
    *,
    groups: int = 1,
    rows: int | None = None,
    mask: Tensor | None = None,  # (rows,) or (G, rows) bool
    center: Tensor | None = None,  # (d,)
    rate: Tensor | None = None,  # (G B,)
    divisor: float = 1.0,
    round_weights: bool = False,
    precision: str = "ieee",
    multiprocessors: int = 132,
    splits: int | None = None,
) -> Softmax:
    """Compute ``softmax(query @ keys.T / divisor) @ values`` and its log-sum-exp.

    Scores are computed in tiles, so neither scores nor weights are allocated as a whole.

    Args:
        query: Prepared queries: float32, or exact in the dtype of the keys with a divisor; for l2, queries minus the
            center.
        keys: The keys as stored.
        values: The values as stored.
        metric: Name of the metric.
        groups: Number of groups, G.
        rows: Number of rows to read in each group; the rest are free. None for all.
        mask: False for rows that no query may see, or None.
        center: For l2, the point that was subtracted from the queries, float32.
        rate: For l2, 1 / temperature of each query, float32.
        divisor: A number that divides the scores.
        round_weights: Whether weights may be rounded to the dtype of the values.
        precision: ``input_precision`` of products of float32: see `softdb.kernels.cuda.launch.choose_precision`.
        multiprocessors: Number of multiprocessors of the device.
        splits: Number of splits of the rows; None to choose it.
    """
    count, key_width, value_width = len(query), query.shape[-1], values.shape[-1]
    group_rows, queries = len(keys) // groups, count // groups
    rows = group_rows if rows is None else rows
    if count == 0 or rows == 0:
        empty = query.new_full((count,), -math.inf, dtype=torch.float32)
        return Softmax(query.new_zeros(count, value_width, dtype=torch.float32), empty, empty.clone(), empty.exp())
    query, keys, values = query.contiguous(), with_unit_stride(keys), with_unit_stride(values)
    mask = None if mask is None else with_unit_stride(mask).view(torch.uint8)
    key_block, value_block = pad_width(key_width), pad_width(value_width)
    low = is_low(keys) and metric != "l2"
    upcast = needs_upcast(keys) or needs_upcast(values)
    wide_values = upcast or not is_low(values)
    split_query = is_low(keys) and not upcast and query.dtype != keys.dtype
    split_weights = not wide_values and not round_weights
    is_split = split_query or split_weights
    blocks = ForwardBlocks.choose(queries, key_block, value_block, low=low, is_split=is_split)
    query_blocks, row_blocks = count_blocks(queries, blocks.queries), count_blocks(rows, blocks.rows)
    splits = splits or count_splits(row_blocks, query_blocks * groups, multiprocessors, blocks.programs)
    split_rows = count_blocks(row_blocks, splits) * blocks.rows
    splits = count_blocks(rows, split_rows)
    parts = [query.new_empty(splits, count, *shape, dtype=torch.float32) for shape in ((value_width,), (), (), ())]
    _read[(query_blocks * splits * groups,)](
        query,
        keys,
        values,
        mask,
        center,
        rate,
        *parts,
        queries,
        rows,
        group_rows,
        keys.stride(0),
        values.stride(0),
        0 if mask is None or mask.dim() == 1 else mask.stride(0),
        query_blocks,
        splits,
        split_rows,
        LOG2_E / divisor,
        METRIC=METRIC_KINDS[metric],
        HAS_MASK=mask is not None,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        KEY_BLOCK=key_block,
        VALUE_BLOCK=value_block,
        QUERIES=blocks.queries,
        ROWS=blocks.rows,
        SPLIT_QUERY=split_query,
        SPLIT_WEIGHTS=split_weights,
        WIDE_VALUES=wide_values,
        UPCAST=upcast,
        PRECISION=precision,
        CHUNK=choose_chunk(precision) if keys.dtype == torch.float32 and blocks.queries > MIN_BLOCK else 0,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if splits == 1:
        return Softmax(*(part[0] for part in parts))
    merged = [torch.empty_like(part[0]) for part in parts]
    _merge[(count,)](
        *parts,
        *merged,
        count,
        splits,
        WIDTH=value_width,
        BLOCK=value_block,
        SPLITS=max(2, 1 << (splits - 1).bit_length()),
        CHUNK=MERGED_SPLITS,
        num_warps=4,
    )
    return Softmax(*merged)
