"""Kernels in Triton that gather rows by index, score them, and sum their values.

Each query has a program of its own, which gathers the rows of its candidates in blocks. The gathered rows, (M, k, d)
and (M, k, dv), are never allocated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.cuda.launch import LOG2_E, count_blocks, on_device, pad_width, with_unit_stride
from softdb.kernels.cuda.metric import score_rows

__all__ = [
    "blend_rows",
    "choose_block",
    "gather_block",
    "load_vector",
    "read_rows",
    "score_candidates",
    "store_vector",
]

# Number of elements of gathered rows that a program holds at once.
BLOCK_ELEMENTS = 8192


@triton.jit
def load_vector(vectors, number, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load one row of a contiguous float32 matrix."""
    columns = tl.arange(0, BLOCK)
    return tl.load(vectors + number * WIDTH + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def store_vector(vectors, number, vector, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store one row of a contiguous matrix."""
    columns = tl.arange(0, BLOCK)
    tl.store(vectors + number * WIDTH + columns, vector.to(vectors.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def gather_block(table, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of a table as float32; zeros where the row is -1."""
    columns = tl.arange(0, BLOCK)
    is_element = (rows >= 0)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(table + rows[:, None] * stride + columns[None, :], mask=is_element, other=0.0).to(tl.float32)


@triton.jit
def _score_kernel(
    query,  # (M, d)
    scale,  # (M,)
    keys,  # (N, d)
    index,  # (M, k)
    scores,  # (M, k)
    k,
    blocks,
    key_stride,
    WIDTH: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Score one block of candidates of one query."""
    program = tl.program_id(0).to(tl.int64)
    number = program // blocks
    entries = (program % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_entry = entries < k
    rows = tl.load(index + number * k + entries, mask=is_entry, other=-1)
    factor = 1.0
    if METRIC == "l2":
        factor = tl.load(scale + number)
    vector = load_vector(query, number, WIDTH, BLOCK_D)
    found = score_rows(vector, factor, gather_block(keys, rows, key_stride, WIDTH, BLOCK_D), METRIC)
    tl.store(scores + number * k + entries, tl.where(rows >= 0, found, float("-inf")), mask=is_entry)


@triton.jit
def _blend_kernel(
    weights,  # (M, k)
    values,  # (N, dv)
    index,  # (M, k)
    blend,  # (M, dv)
    k,
    value_stride,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum the weighted values of the candidates of one query."""
    number = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, k, BLOCK_K):
        entries = start + tl.arange(0, BLOCK_K)
        rows = tl.load(index + number * k + entries, mask=entries < k, other=-1)
        factors = tl.load(weights + number * k + entries, mask=entries < k, other=0.0)
        total += tl.sum(factors[:, None] * gather_block(values, rows, value_stride, WIDTH, BLOCK_V), 0)
    store_vector(blend, number, total, WIDTH, BLOCK_V)


@triton.jit
def _read_kernel(
    query,  # (M, d)
    scale,  # (M,)
    keys,  # (N, d)
    values,  # (N, dv)
    index,  # (M, k)
    offsets,  # (M, k)
    scores,  # (M, k)
    weights,  # (M, k)
    lse,  # (M,)
    blend,  # (M, dv)
    k,
    key_stride,
    value_stride,
    log2_e,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    METRIC: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Read the candidates of one query: scores, softmax and weighted sum."""
    number = tl.program_id(0).to(tl.int64)
    vector = load_vector(query, number, WIDTH, BLOCK_D)
    factor = 1.0
    if METRIC == "l2":
        factor = tl.load(scale + number)
    # One maximum and one sum for each place in a block, so that the loop has no reduction over the block.
    highest = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, k, BLOCK_K):
        entries = start + tl.arange(0, BLOCK_K)
        rows = tl.load(index + number * k + entries, mask=entries < k, other=-1)
        found = score_rows(vector, factor, gather_block(keys, rows, key_stride, WIDTH, BLOCK_D), METRIC)
        if HAS_OFFSETS:
            found += tl.load(offsets + number * k + entries, mask=entries < k, other=0.0)
        found = tl.where(rows >= 0, found, float("-inf"))
        tl.store(scores + number * k + entries, found, mask=entries < k)
        before = highest
        highest = tl.maximum(before, found)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2((before - finite) * log2_e) + tl.exp2((found - finite) * log2_e)
    largest = tl.max(highest, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    whole = tl.sum(total * tl.exp2((highest - largest) * log2_e), 0)
    divisor = tl.where(whole == 0.0, 1.0, whole)
    tl.store(lse + number, tl.where(whole == 0.0, float("-inf"), largest + tl.log(divisor)))
    tl.debug_barrier()  # the scores that other threads stored are read again
    mean = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, k, BLOCK_K):
        entries = start + tl.arange(0, BLOCK_K)
        rows = tl.load(index + number * k + entries, mask=entries < k, other=-1)
        found = tl.load(scores + number * k + entries, mask=entries < k, other=float("-inf"))
        part = tl.where(rows >= 0, tl.exp2((found - largest) * log2_e) / divisor, 0.0)
        tl.store(weights + number * k + entries, part, mask=entries < k)
        mean += tl.sum(part[:, None] * gather_block(values, rows, value_stride, VALUE_WIDTH, BLOCK_V), 0)
    store_vector(blend, number, mean, VALUE_WIDTH, BLOCK_V)


def choose_block(k: int, *widths: int) -> int:
    """Choose the number of candidates in a block."""
    wanted: int = triton.next_power_of_2(max(1, k))
    return min(wanted, max(8, BLOCK_ELEMENTS // max(widths)))


@torch.library.custom_op("softdb::cuda_score_rows", mutates_args=())
def score_candidates(query: Tensor, scale: Tensor | None, keys: Tensor, index: Tensor, metric: str) -> Tensor:
    """Score the keys at (M, k) ``index``; -inf where it is -1.

    Args:
        query: Queries, (M, d) float32; see `softdb.kernels.cuda.metric`.
        scale: Scales, (M,), for l2.
        keys: Keys as stored, (N, d).
        index: Rows of each query.
        metric: Name of the metric.
    """
    count, k = index.shape
    scores = query.new_empty(count, k)
    if scores.numel():
        keys, width = with_unit_stride(keys), query.shape[1]
        columns = pad_width(width)
        block = choose_block(k, columns)
        blocks = count_blocks(k, block)
        with on_device(query):
            _score_kernel[(count * blocks,)](
                query.contiguous(),
                query if scale is None else scale.contiguous(),
                keys,
                index.contiguous(),
                scores,
                k,
                blocks,
                keys.stride(0),
                WIDTH=width,
                METRIC=metric,
                BLOCK_K=block,
                BLOCK_D=columns,
            )
    return scores


@score_candidates.register_fake
def _(query: Tensor, scale: Tensor | None, keys: Tensor, index: Tensor, metric: str) -> Tensor:
    return query.new_empty(index.shape)


@torch.library.custom_op("softdb::cuda_blend_rows", mutates_args=())
def blend_rows(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:  # (M, k), (N, dv), (M, k) -> (M, dv)
    """Compute weighted sums of values in float32; rows at -1 are 0."""
    count, k = index.shape
    values, width = with_unit_stride(values), values.shape[1]
    blend = weights.new_empty(count, width)
    if count:
        columns = pad_width(width)
        with on_device(values):
            _blend_kernel[(count,)](
                weights.contiguous(),
                values,
                index.contiguous(),
                blend,
                k,
                values.stride(0),
                WIDTH=width,
                BLOCK_K=choose_block(k, columns),
                BLOCK_V=columns,
            )
    return blend


@blend_rows.register_fake
def _(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return weights.new_empty(len(index), values.shape[1])


@torch.library.custom_op("softdb::cuda_read_rows", mutates_args=())
def read_rows(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the rows at ``index``: scores, softmax and weighted sum.

    Args:
        query: Queries, (M, d) float32; see `softdb.kernels.cuda.metric`.
        scale: Scales, (M,), for l2.
        keys: Keys as stored, (N, d).
        values: Values as stored, (N, dv).
        index: Rows of each query, (M, k); -1 is padding.
        offsets: Numbers that are added to the scores, (M, k), or None.
        metric: Name of the metric.

    Returns:
        In float32: scores, (M, k), -inf at padding; weights, (M, k), 0 at padding; log-sum-exp, (M,); weighted sum,
        (M, dv).
    """
    count, k = index.shape
    width, value_width = query.shape[1], values.shape[1]
    scores, weights = query.new_empty(count, k), query.new_empty(count, k)
    lse, blend = query.new_empty(count), query.new_empty(count, value_width)
    if count:
        keys, values = with_unit_stride(keys), with_unit_stride(values)
        columns, value_columns = pad_width(width), pad_width(value_width)
        with on_device(query):
            _read_kernel[(count,)](
                query.contiguous(),
                query if scale is None else scale.contiguous(),
                keys,
                values,
                index.contiguous(),
                query if offsets is None else offsets.contiguous(),
                scores,
                weights,
                lse,
                blend,
                k,
                keys.stride(0),
                values.stride(0),
                LOG2_E,
                WIDTH=width,
                VALUE_WIDTH=value_width,
                METRIC=metric,
                HAS_OFFSETS=offsets is not None,
                BLOCK_K=choose_block(k, columns, value_columns),
                BLOCK_D=columns,
                BLOCK_V=value_columns,
            )
    return scores, weights, lse, blend


@read_rows.register_fake
def _(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = query.new_empty(index.shape)
    return scores, torch.empty_like(scores), query.new_empty(len(index)), query.new_empty(len(index), values.shape[1])
