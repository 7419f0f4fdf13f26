"""Backward pass of an exact read in Triton.

Each program owns a split of the rows, and their gradients. It visits all queries for each of its blocks of rows, and
recomputes the scores. Its tiles are smaller than those of the forward pass, since it holds more of them. A GPU sums the
columns of a score in one order for both, so the scores have the same bits.

Each split adds its part of the gradient of the queries to memory of its own; the parts are summed at the end. So no
program waits for another, and the sums have a fixed order. Where the parts of many queries would leave most
multiprocessors without work, a second kernel computes the gradient of the queries: see
`softdb.kernels.cuda.backward_queries`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.cuda.backward_queries import differentiate_queries
from softdb.kernels.cuda.forward import METRIC_KINDS, is_low, needs_upcast
from softdb.kernels.cuda.launch import (
    LOG2_E,
    choose_chunk,
    count_blocks,
    count_splits,
    pad_width,
    with_unit_stride,
)
from softdb.kernels.cuda.tiles import (
    COSINE,
    L2,
    MIN_NORM,
    find_visible,
    hide,
    load_tile,
    multiply_tiles,
    square_distances,
)

__all__ = ["BackwardBlocks", "Gradients", "Needs", "choose_splits", "read_backward"]

# Maximum size of the parts of the gradient of the queries, in float32 elements: 40 MiB.
MAX_PART_ELEMENTS = 10 * 2**20


class Needs(NamedTuple):
    """Operands that need a gradient."""

    query: bool
    keys: bool
    values: bool
    rate: bool


class Gradients(NamedTuple):
    """Gradients of the operands, None where they are not needed.

    Attributes:
        query: (G B, d), float32.
        keys: (G N, d), in the dtype of the keys.
        values: (G N, dv), in the dtype of the values.
        rate: (G B,), float32.
    """

    query: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    rate: Tensor | None


@dataclass(frozen=True)
class BackwardBlocks:
    """Sizes of a launch, as for `softdb.kernels.cuda.forward.ForwardBlocks`."""

    queries: int
    rows: int
    warps: int
    stages: int

    @classmethod
    def choose(cls, queries: int, key_width: int, value_width: int, *, low: bool) -> BackwardBlocks:
        """Choose the sizes for a number of queries and padded widths.

        Args:
            queries: Number of queries of a group.
            key_width: Padded width of the keys.
            value_width: Padded width of the values.
            low: Whether products are in 16 bits rather than float32.
        """
        width = key_width + value_width
        if low:
            height, rows = (64, 64) if width <= 128 else (32, 64) if width <= 256 else (32, 32)
            return cls(min(height, pad_width(queries)), rows, 8, 2 if width <= 256 else 1)
        height, rows = (32, 32) if width <= 128 else (16, 32) if width <= 256 else (16, 16)
        return cls(min(height, pad_width(queries)), rows, 8, 1)


@triton.jit
def _differentiate(
    query,
    keys,
    values,
    mask,
    center,
    rate,
    grad_blend,
    maximum,
    total,
    delta,
    grad_query,
    grad_rate,
    grad_keys,
    grad_values,
    queries,
    rows,
    group_rows,
    key_stride,
    value_stride,
    mask_stride,
    splits,
    split_rows,
    scale,
    inverse_divisor,
    METRIC: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_QUERY: tl.constexpr,
    LOW_GRADIENTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    GRADIENT_CHUNK: tl.constexpr,
    HAS_BLEND: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    NEEDS_KEYS: tl.constexpr,
    NEEDS_VALUES: tl.constexpr,
    NEEDS_RATE: tl.constexpr,
):
    """Compute the gradients of one split of the rows."""
    split = tl.program_id(0) % splits
    group = (tl.program_id(0) // splits).to(tl.int64)
    part = split.to(tl.int64) * queries * (tl.num_programs(0) // splits)  # place of this split among the parts
    key_columns, value_columns = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    first = split * split_rows
    stop = tl.minimum(first + split_rows, rows)
    for start in range(first, stop, ROWS):
        row = start + tl.arange(0, ROWS)
        visible = find_visible(mask, group * mask_stride + row, row < stop, HAS_MASK)
        row_place = group * group_rows + row
        key = load_tile(keys, row_place, key_stride, visible, KEY_WIDTH, KEY_BLOCK, UPCAST)
        if METRIC == L2:
            key = key.to(tl.float32) - tl.load(center + key_columns, mask=key_columns < KEY_WIDTH, other=0.0)[None, :]
        if METRIC == COSINE:
            wide = key.to(tl.float32)
            norm = tl.sqrt(tl.sum(wide * wide, 1))
            inverse = 1.0 / tl.maximum(norm, MIN_NORM)
        product_key = key if LOW_GRADIENTS else key.to(tl.float32)
        if HAS_BLEND:
            value = load_tile(values, row_place, value_stride, visible, VALUE_WIDTH, VALUE_BLOCK, not LOW_GRADIENTS)
        key_sum = tl.zeros((ROWS, KEY_BLOCK), tl.float32)
        value_sum = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
        score_sum = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, queries, QUERIES):
            number = begin + tl.arange(0, QUERIES)
            valid = number < queries
            place = group * queries + number
            repeated = tl.full((QUERIES,), start, tl.int32) > first  # whether the parts hold numbers
            operand = load_tile(query, place, KEY_WIDTH, valid, KEY_WIDTH, KEY_BLOCK, UPCAST)
            if METRIC == L2:
                speed = tl.load(rate + place, mask=valid, other=0.0)
                distances = square_distances(
                    query, place, valid, keys, row_place, key_stride, visible, center, QUERIES, ROWS, KEY_WIDTH
                )
                scores = distances * (-scale * speed)[:, None]
            else:
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
                    scores = scores * inverse[None, :]
                scores = scores * scale
            highest = tl.load(maximum + place, mask=valid, other=0.0)
            sums = tl.load(total + place, mask=valid, other=1.0)
            highest = tl.where(highest == float("-inf"), 0.0, highest)
            sums = tl.where(sums == 0.0, 1.0, sums)  # all weights are 0 then
            weights = tl.exp2(hide(scores, visible) - highest[:, None]) / sums[:, None]
            grad_scores = -tl.load(delta + place, mask=valid, other=0.0)[:, None]
            if HAS_BLEND:
                upstream = load_tile(grad_blend, place, VALUE_WIDTH, valid, VALUE_WIDTH, VALUE_BLOCK, not LOW_GRADIENTS)
                if NEEDS_VALUES:
                    value_sum += tl.dot(
                        tl.trans(weights.to(upstream.dtype)), upstream, input_precision=GRADIENT_PRECISION
                    )
                if NEEDS_QUERY or NEEDS_KEYS or NEEDS_RATE:
                    grad_scores += multiply_tiles(
                        grad_blend,
                        place,
                        VALUE_WIDTH,
                        valid,
                        upstream,
                        values,
                        row_place,
                        value_stride,
                        visible,
                        value,
                        QUERIES,
                        ROWS,
                        VALUE_WIDTH,
                        GRADIENT_CHUNK,
                        False,
                        GRADIENT_PRECISION,
                    )
            grad_scores = grad_scores * weights
            if NEEDS_RATE:
                rate_part = tl.sum(tl.where(visible[None, :], -grad_scores * distances, 0.0), 1)
                rate_place = grad_rate + part + place
                before = tl.load(rate_place, mask=valid & repeated, other=0.0)
                tl.store(rate_place, before + rate_part, mask=valid)
            if METRIC == L2:
                grad_scores = grad_scores * (2.0 * speed)[:, None]
            product_scores = grad_scores.to(product_key.dtype)
            if NEEDS_KEYS:
                key_sum += tl.dot(
                    tl.trans(product_scores), operand.to(product_key.dtype), input_precision=GRADIENT_PRECISION
                )
                if METRIC == L2:
                    score_sum += tl.sum(grad_scores, 0)
            if NEEDS_QUERY:
                if METRIC == COSINE:
                    product_scores = (grad_scores * inverse[None, :]).to(product_key.dtype)
                query_part = tl.dot(product_scores, product_key, input_precision=GRADIENT_PRECISION)
                if METRIC == L2:
                    query_part -= operand * tl.sum(grad_scores, 1)[:, None]
                inside = valid[:, None] & (key_columns < KEY_WIDTH)[None, :]
                query_place = grad_query + (part + place)[:, None] * KEY_WIDTH + key_columns[None, :]
                before = tl.load(query_place, mask=inside & repeated[:, None], other=0.0)
                tl.store(query_place, before + query_part, mask=inside)
        # The next block of rows reads the parts of this one, perhaps in other threads.
        tl.debug_barrier()
        written = (row < stop)[:, None]
        if NEEDS_KEYS:
            if METRIC == L2:
                key_sum -= key * score_sum[:, None]
            elif METRIC == COSINE:
                unit = key.to(tl.float32) * inverse[:, None]
                along = tl.where(norm < MIN_NORM, 0.0, tl.sum(key_sum * unit, 1))
                key_sum = (key_sum - unit * along[:, None]) * inverse[:, None]
            else:
                key_sum = key_sum * inverse_divisor
            tl.store(
                grad_keys + row_place[:, None] * KEY_WIDTH + key_columns[None, :],
                tl.where(visible[:, None], key_sum, 0.0).to(grad_keys.dtype.element_ty),
                mask=written & (key_columns < KEY_WIDTH)[None, :],
            )
        if NEEDS_VALUES:
            tl.store(
                grad_values + row_place[:, None] * VALUE_WIDTH + value_columns[None, :],
                value_sum.to(grad_values.dtype.element_ty),
                mask=written & (value_columns < VALUE_WIDTH)[None, :],
            )


def choose_splits(
    needs: Needs, count: int, key_width: int, row_blocks: int, query_blocks: int, groups: int, multiprocessors: int
) -> tuple[int, bool]:
    """Choose the number of splits, and whether other programs own the queries.

    They do if the splits whose parts fit in memory use less than half of the multiprocessors and blocks of queries use
    at least half. Without gradients of keys and values no product is computed twice, so a lack of rows is a reason,
    too; otherwise only a lack of memory is.

    Args:
        needs: The gradients to compute.
        count: Number of queries of all groups.
        key_width: Width of the keys.
        row_blocks: Number of blocks of rows of a group.
        query_blocks: Number of blocks of queries of a group.
        groups: Number of groups.
        multiprocessors: Number of multiprocessors of the device.
    """
    splits = count_splits(row_blocks, groups, multiprocessors, 1)
    part = count * key_width if needs.query else count if needs.rate else 0
    fitting = min(splits, max(1, MAX_PART_ELEMENTS // part)) if part else splits
    may_own = part > 0 and (fitting < splits or not (needs.keys or needs.values))
    if may_own and 2 * fitting * groups < multiprocessors <= 2 * query_blocks * groups:
        return splits, True
    return fitting, False


def read_backward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    metric: str,
    maximum: Tensor,  # (G B,)
    total: Tensor,  # (G B,)
    delta: Tensor,  # (G B,)
    grad_blend: Tensor | None,  # (G B, dv)
    needs: Needs,
    *,
    groups: int = 1,
    rows: int | None = None,
    mask: Tensor | None = None,
    center: Tensor | None = None,
    rate: Tensor | None = None,
    divisor: float = 1.0,
    precision: str = "ieee",
    multiprocessors: int = 132,
    splits: int | None = None,
    owns_queries: bool | None = None,
) -> Gradients:
    """Compute the gradients of an exact read.

    ``grad_score = weight * (grad_blend @ value - delta)``

    Args:
        query: As for `softdb.kernels.cuda.forward.read_forward`, and so are the arguments that are not listed here.
        keys: The keys as stored.
        values: The values as stored.
        metric: Name of the metric.
        maximum: Largest score of each query, from forward.
        total: Sum of the exponentials of each query, from forward.
        delta: ``(grad_blend * blend).sum(-1) - grad_lse``, float32.
        grad_blend: Gradient of the blend, or None for 0. If it has the dtype of the values, weights and gradients of
            scores are rounded to that dtype; otherwise it is float32.
        needs: The gradients to compute. The gradient of the values needs that of the blend.
        groups: Number of groups.
        rows: Number of rows to read in each group. The gradients of free rows are 0.
        mask: False for rows that no query may see.
        center: The center of l2.
        rate: 1 / temperature of each query, for l2.
        divisor: A number that divides the scores. The gradient of the query is that of ``query / divisor``.
        precision: ``input_precision`` of products of float32: see `softdb.kernels.cuda.launch.choose_precision`.
        multiprocessors: Number of multiprocessors of the device.
        splits: Number of splits of the rows; None to choose it.
        owns_queries: Whether programs that own queries compute their gradients: see
            `softdb.kernels.cuda.backward_queries`. None to choose it; False if ``splits`` is given.
    """
    count, key_width, value_width = len(query), query.shape[-1], values.shape[-1]
    group_rows, queries = len(keys) // groups, count // groups
    rows = group_rows if rows is None else rows
    needs = needs._replace(values=needs.values and grad_blend is not None)
    allocate = torch.empty_like if rows == group_rows and count else torch.zeros_like
    grad_keys = allocate(keys, memory_format=torch.contiguous_format) if needs.keys else None
    grad_values = allocate(values, memory_format=torch.contiguous_format) if needs.values else None
    if count == 0 or rows == 0:
        grad_query = query.new_zeros(query.shape, dtype=torch.float32) if needs.query else None
        grad_rate = maximum.new_zeros(count) if needs.rate else None
        return Gradients(grad_query, grad_keys, grad_values, grad_rate)
    query, keys, values = query.contiguous(), with_unit_stride(keys), with_unit_stride(values)
    mask = None if mask is None else with_unit_stride(mask).view(torch.uint8)
    grad_blend = None if grad_blend is None else grad_blend.contiguous()
    upcast = needs_upcast(keys) or needs_upcast(values)
    low = grad_blend is not None and is_low(grad_blend) and metric != "l2"
    key_block, value_block = pad_width(key_width), pad_width(value_width)
    blocks = BackwardBlocks.choose(queries, key_block, value_block, low=low)
    row_blocks = count_blocks(rows, blocks.rows)
    chosen, starved = choose_splits(
        needs, count, key_width, row_blocks, count_blocks(queries, blocks.queries), groups, multiprocessors
    )
    if owns_queries is None:
        owns_queries = starved and splits is None
    splits = chosen if splits is None else splits
    split_rows = count_blocks(row_blocks, splits) * blocks.rows
    splits = count_blocks(rows, split_rows)
    # Weights underflow in float16. TF32 has the digits of float16 and the exponents of float32.
    gradient_precision = "tf32" if low else precision
    low_gradients = low and keys.dtype == values.dtype == torch.bfloat16 and not upcast
    operands = keys, values, mask, center, rate, grad_blend, maximum, total, delta
    mask_stride = 0 if mask is None or mask.dim() == 1 else mask.stride(0)
    sizes = queries, rows, group_rows, keys.stride(0), values.stride(0), mask_stride
    options: dict[str, Any] = {
        "METRIC": METRIC_KINDS[metric],
        "HAS_MASK": mask is not None,
        "KEY_WIDTH": key_width,
        "VALUE_WIDTH": value_width,
        "KEY_BLOCK": key_block,
        "VALUE_BLOCK": value_block,
        "QUERIES": blocks.queries,
        "ROWS": blocks.rows,
        "SPLIT_QUERY": is_low(keys) and not upcast and query.dtype != keys.dtype,
        "LOW_GRADIENTS": low_gradients,
        "UPCAST": upcast,
        "PRECISION": precision,
        "CHUNK": choose_chunk(precision) if keys.dtype == torch.float32 else 0,
        "GRADIENT_PRECISION": gradient_precision,
        "GRADIENT_CHUNK": 0 if low_gradients else choose_chunk(gradient_precision),
        "HAS_BLEND": grad_blend is not None,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    scale = LOG2_E / divisor
    if owns_queries:
        grad_query, grad_rate = differentiate_queries(
            query, operands, sizes, scale, needs_query=needs.query, needs_rate=needs.rate, **options
        )
        if not (needs.keys or needs.values):
            return Gradients(grad_query, None, None, grad_rate)
        needs = needs._replace(query=False, rate=False)
    query_parts = query.new_empty(splits, count, key_width, dtype=torch.float32) if needs.query else None
    rate_parts = maximum.new_empty(splits, count) if needs.rate else None
    _differentiate[(splits * groups,)](
        query,
        *operands,
        query_parts,
        rate_parts,
        grad_keys,
        grad_values,
        *sizes,
        splits,
        split_rows,
        scale,
        1 / divisor,
        NEEDS_QUERY=needs.query,
        NEEDS_KEYS=needs.keys,
        NEEDS_VALUES=needs.values,
        NEEDS_RATE=needs.rate,
        **options,
    )
    if not owns_queries:
        grad_query, grad_rate = _sum_parts(query_parts), _sum_parts(rate_parts)
    return Gradients(grad_query, grad_keys, grad_values, grad_rate)


def _sum_parts(parts: Tensor | None) -> Tensor | None:
    """Sum the parts of a gradient."""
    return None if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)
