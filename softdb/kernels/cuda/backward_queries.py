"""Gradients of queries in Triton, by programs that own blocks of queries.

`softdb.kernels.cuda.backward` computes all gradients in programs that own rows, with one part of the gradient of the
queries for each split. For many queries, few parts fit in memory, and few programs use few multiprocessors. Here each
program owns a block of queries instead: it visits all rows, holds the gradients of its queries in registers and writes
them once. There are no parts, and sums have a fixed order.

The scores and their gradients are then computed twice: with the gradients of keys and values there are 7 products
instead of 5.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.cuda.launch import count_blocks
from softdb.kernels.cuda.tiles import (
    COSINE,
    L2,
    find_visible,
    hide,
    inverse_norm,
    load_tile,
    multiply_tiles,
    square_distances,
)

__all__ = ["differentiate_queries"]


@triton.jit
def _differentiate_queries(
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
    queries,
    rows,
    group_rows,
    key_stride,
    value_stride,
    mask_stride,
    query_blocks,
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
    LOW_GRADIENTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    GRADIENT_CHUNK: tl.constexpr,
    HAS_BLEND: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    NEEDS_RATE: tl.constexpr,
):
    """Compute the gradients of one block of queries."""
    group = (tl.program_id(0) // query_blocks).to(tl.int64)
    number = tl.program_id(0) % query_blocks * QUERIES + tl.arange(0, QUERIES)
    valid = number < queries
    place = group * queries + number
    key_columns = tl.arange(0, KEY_BLOCK)
    if METRIC == L2:
        speed = tl.load(rate + place, mask=valid, other=0.0)
    else:
        operand = load_tile(query, place, KEY_WIDTH, valid, KEY_WIDTH, KEY_BLOCK, UPCAST)
    if HAS_BLEND:
        upstream = load_tile(grad_blend, place, VALUE_WIDTH, valid, VALUE_WIDTH, VALUE_BLOCK, not LOW_GRADIENTS)
    highest = tl.load(maximum + place, mask=valid, other=0.0)
    sums = tl.load(total + place, mask=valid, other=1.0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    sums = tl.where(sums == 0.0, 1.0, sums)  # all weights are 0 then
    shift = tl.load(delta + place, mask=valid, other=0.0)
    query_sum = tl.zeros((QUERIES, KEY_BLOCK), tl.float32)
    score_sum = tl.zeros((QUERIES,), tl.float32)
    rate_sum = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        visible = find_visible(mask, group * mask_stride + row, row < rows, HAS_MASK)
        row_place = group * group_rows + row
        key = load_tile(keys, row_place, key_stride, visible, KEY_WIDTH, KEY_BLOCK, UPCAST)
        if METRIC == L2:
            key = key.to(tl.float32) - tl.load(center + key_columns, mask=key_columns < KEY_WIDTH, other=0.0)[None, :]
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
                inverse = inverse_norm(key)
                scores = scores * inverse[None, :]
            scores = scores * scale
        weights = tl.exp2(hide(scores, visible) - highest[:, None]) / sums[:, None]
        grad_scores = tl.zeros((QUERIES, ROWS), tl.float32) - shift[:, None]
        if HAS_BLEND:
            value = load_tile(values, row_place, value_stride, visible, VALUE_WIDTH, VALUE_BLOCK, not LOW_GRADIENTS)
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
            rate_sum += tl.sum(tl.where(visible[None, :], -grad_scores * distances, 0.0), 1)
        if NEEDS_QUERY:
            if METRIC == L2:
                grad_scores = grad_scores * (2.0 * speed)[:, None]
                score_sum += tl.sum(grad_scores, 1)
            elif METRIC == COSINE:
                grad_scores = grad_scores * inverse[None, :]
            product_key = key if LOW_GRADIENTS else key.to(tl.float32)
            query_sum += tl.dot(grad_scores.to(product_key.dtype), product_key, input_precision=GRADIENT_PRECISION)
    if NEEDS_RATE:
        tl.store(grad_rate + place, rate_sum, mask=valid)
    if NEEDS_QUERY:
        if METRIC == L2:
            query_sum -= load_tile(query, place, KEY_WIDTH, valid, KEY_WIDTH, KEY_BLOCK, True) * score_sum[:, None]
        tl.store(
            grad_query + place[:, None] * KEY_WIDTH + key_columns[None, :],
            query_sum,
            mask=valid[:, None] & (key_columns < KEY_WIDTH)[None, :],
        )


def differentiate_queries(
    query: Tensor,
    operands: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    scale: float,
    *,
    needs_query: bool,
    needs_rate: bool,
    **options: Any,
) -> tuple[Tensor | None, Tensor | None]:  # (G B, d), (G B,)
    """Compute the gradients of the queries and of their rates.

    Args:
        query: Contiguous queries, (G B, d).
        operands: The other tensors of `softdb.kernels.cuda.backward.read_backward`, in the order of the kernel.
        sizes: Number of queries and of rows of a group, rows of its storage, strides of keys, values and mask.
        scale: Factor of the scores, in units of log 2.
        needs_query: Whether to compute the gradient of the queries.
        needs_rate: Whether to compute the gradient of the rates.
        options: Compile-time arguments that this kernel and the one that owns rows share.
    """
    grad_query = torch.empty_like(query, dtype=torch.float32) if needs_query else None
    grad_rate = query.new_empty(len(query), dtype=torch.float32) if needs_rate else None
    query_blocks = count_blocks(sizes[0], options["QUERIES"])
    groups = len(query) // sizes[0]
    _differentiate_queries[(query_blocks * groups,)](
        query,
        *operands,
        grad_query,
        grad_rate,
        *sizes,
        query_blocks,
        scale,
        NEEDS_QUERY=needs_query,
        NEEDS_RATE=needs_rate,
        **options,
    )
    return grad_query, grad_rate
