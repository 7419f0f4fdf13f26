"""Gradients of gathered rows in Triton, without atomic additions.

A row-sparse gradient has one entry for each candidate of each query, (M k, d). For a dense gradient the candidates are
sorted by row, and one program sums the entries of a row in their order. Both have the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.cuda.gather import choose_block, gather_block, load_vector, store_vector
from softdb.kernels.cuda.launch import on_device, pad_width, with_unit_stride
from softdb.kernels.cuda.metric import norm_rows

__all__ = ["read_rows_backward", "sum_by_row"]

# Number of entries that `sum_by_row` adds at once.
BLOCK_ENTRIES = 16


@triton.jit
def _read_backward_kernel(
    query,  # (M, d)
    scale,  # (M,)
    keys,  # (N, d)
    values,  # (N, dv)
    index,  # (M, k)
    weights,  # (M, k)
    blend,  # (M, dv)
    grad_scores,  # (M, k)
    grad_weights,  # (M, k)
    grad_lse,  # (M,)
    grad_blend,  # (M, dv)
    grad_query,  # (M, d)
    grad_scale,  # (M,)
    grad_totals,  # (M, k)
    grad_keys,  # (M k, d)
    grad_values,  # (M k, dv)
    k,
    key_stride,
    value_stride,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    METRIC: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_BLEND: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    NEEDS_KEYS: tl.constexpr,
    NEEDS_VALUES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the gradients of one query, its scores and its candidates."""
    number = tl.program_id(0).to(tl.int64)
    vector = load_vector(query, number, WIDTH, BLOCK_D)
    factor = 1.0
    if METRIC == "l2":
        factor = tl.load(scale + number)
    shift = tl.sum(tl.zeros((BLOCK_K,), tl.float32), 0)  # subtracted from the gradient of each weight
    upstream = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_BLEND:
        upstream = load_vector(grad_blend, number, VALUE_WIDTH, BLOCK_V)
        shift += tl.sum(upstream * load_vector(blend, number, VALUE_WIDTH, BLOCK_V), 0)
    if HAS_WEIGHTS:
        for start in range(0, k, BLOCK_K):
            entries = start + tl.arange(0, BLOCK_K)
            part = tl.load(weights + number * k + entries, mask=entries < k, other=0.0)
            shift += tl.sum(part * tl.load(grad_weights + number * k + entries, mask=entries < k, other=0.0), 0)
    if HAS_LSE:
        shift -= tl.load(grad_lse + number)
    query_total = tl.zeros((BLOCK_D,), tl.float32)
    scale_total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, k, BLOCK_K):
        entries = start + tl.arange(0, BLOCK_K)
        is_entry = entries < k
        places = number * k + entries
        rows = tl.load(index + places, mask=is_entry, other=-1)
        part = tl.load(weights + places, mask=is_entry, other=0.0)
        slope = tl.zeros((BLOCK_K,), tl.float32) - shift
        if HAS_BLEND:
            slope += tl.sum(upstream[None, :] * gather_block(values, rows, value_stride, VALUE_WIDTH, BLOCK_V), 1)
        if HAS_WEIGHTS:
            slope += tl.load(grad_weights + places, mask=is_entry, other=0.0)
        slope = part * slope
        if HAS_SCORES:
            slope += tl.load(grad_scores + places, mask=is_entry, other=0.0)
        slope = tl.where(rows >= 0, slope, 0.0)
        tl.store(grad_totals + places, slope, mask=is_entry)
        if NEEDS_QUERY or NEEDS_KEYS:
            block = gather_block(keys, rows, key_stride, WIDTH, BLOCK_D)
            columns = tl.arange(0, BLOCK_D)
            if METRIC == "l2":
                block = tl.where((columns < WIDTH)[None, :], block - vector[None, :], 0.0)
                scale_total -= slope * tl.sum(block * block, 1)
                key_part = (-2.0 * factor * slope)[:, None] * block
                query_total -= tl.sum(key_part, 0)
            elif METRIC == "cosine":
                norms = norm_rows(block)
                block = block / norms[:, None]
                query_total += tl.sum(slope[:, None] * block, 0)
                along = tl.sum(vector[None, :] * block, 1)
                along = tl.where(norms > 1e-12, along, 0.0)  # the norm is constant where it is clamped
                key_part = (slope / norms)[:, None] * (vector[None, :] - along[:, None] * block)
            else:
                query_total += tl.sum(slope[:, None] * block, 0)
                key_part = slope[:, None] * vector[None, :]
            if NEEDS_KEYS:
                tl.store(
                    grad_keys + places[:, None] * WIDTH + columns[None, :],
                    key_part.to(grad_keys.dtype.element_ty),
                    mask=is_entry[:, None] & (columns < WIDTH)[None, :],
                )
        if NEEDS_VALUES:
            columns = tl.arange(0, BLOCK_V)
            tl.store(
                grad_values + places[:, None] * VALUE_WIDTH + columns[None, :],
                (part[:, None] * upstream[None, :]).to(grad_values.dtype.element_ty),
                mask=is_entry[:, None] & (columns < VALUE_WIDTH)[None, :],
            )
    if NEEDS_QUERY:
        store_vector(grad_query, number, query_total, WIDTH, BLOCK_D)
        if METRIC == "l2":
            tl.store(grad_scale + number, tl.sum(scale_total, 0))


@triton.jit
def _sum_by_row_kernel(
    rows,  # (E,) ascending
    order,  # (E,)
    coefficients,  # (E,)
    vectors,  # (M, width)
    scale,  # (M,)
    keys,  # (N, width)
    out,  # (N, width)
    count,
    k,
    key_stride,
    WIDTH: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the entries of one row, in the program of the first of them."""
    first = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + first)
    before = tl.load(rows + first - 1, mask=first > 0, other=-1)
    if (row >= 0) & (row != before):
        columns = tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        # The block holds one key, since functions on keys take blocks.
        key = gather_block(keys, row + tl.zeros((1,), tl.int64), key_stride, WIDTH, BLOCK_D)
        start = first
        found = BLOCK_E
        while found == BLOCK_E:
            places = start + tl.arange(0, BLOCK_E)
            is_own = tl.load(rows + places, mask=places < count, other=-1) == row
            entries = tl.load(order + places, mask=is_own, other=0)
            factors = tl.load(coefficients + entries, mask=is_own, other=0.0)
            numbers = entries // k
            block = tl.load(
                vectors + numbers[:, None] * WIDTH + columns[None, :],
                mask=is_own[:, None] & (columns < WIDTH)[None, :],
                other=0.0,
            )
            if METRIC == "l2":
                block = block - key
                factors = 2.0 * factors * tl.load(scale + numbers, mask=is_own, other=0.0)
            total += tl.sum(factors[:, None] * block, 0)
            found = tl.sum(is_own.to(tl.int32), 0)
            start += BLOCK_E
        if METRIC == "cosine":
            norms = norm_rows(key)
            unit = key / norms[:, None]
            along = tl.where(norms > 1e-12, tl.sum(unit * total[None, :], 1), 0.0)
            total = tl.sum((total[None, :] - along[:, None] * unit) / norms[:, None], 0)
        store_vector(out, row, total, WIDTH, BLOCK_D)


@torch.library.custom_op("softdb::cuda_read_rows_backward", mutates_args=())
def read_rows_backward(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    weights: Tensor,
    blend: Tensor,
    grad_scores: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    grad_blend: Tensor | None,
    metric: str,
    needs_query: bool,
    needs_keys: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `read_rows`.

    ``grad_score = weight * (grad_blend @ value + grad_weight - shift) + own gradient``, where ``shift`` is
    ``grad_blend @ blend + sum(weight * grad_weight) - grad_lse``.

    Args:
        query: As for `read_rows`.
        scale: As for `read_rows`.
        keys: As for `read_rows`.
        values: As for `read_rows`.
        index: As for `read_rows`.
        weights: Weights of forward.
        blend: Weighted sum of forward.
        grad_scores: Gradient of the scores, (M, k), or None.
        grad_weights: Gradient of the weights, (M, k), or None.
        grad_lse: Gradient of the log-sum-exp, (M,), or None.
        grad_blend: Gradient of the weighted sum, (M, dv), or None.
        metric: Name of the metric.
        needs_query: Whether to compute the gradients of query and scale.
        needs_keys: Whether to compute the gradient of the keys for each candidate.
        needs_values: Whether to compute the gradient of the values for each candidate.

    Returns:
        Gradients of the query, (M, d), the scale, (M,), the sums of score and offset, (M, k), the keys, (M k, d), and
        the values, (M k, dv), each candidate its own row. Empty tensors where they are not needed.
    """
    results = _allocate_gradients(query, scale, keys, values, index, needs_query, needs_keys, needs_values)
    count, k = index.shape
    if index.numel() == 0:
        return tuple(result.zero_() for result in results)  # type: ignore[return-value]
    width, value_width = query.shape[1], values.shape[1]
    keys, values = with_unit_stride(keys), with_unit_stride(values)
    columns, value_columns = pad_width(width), pad_width(value_width)
    gradients = grad_scores, grad_weights, grad_lse, grad_blend
    with on_device(query):
        _read_backward_kernel[(count,)](
            query.contiguous(),
            query if scale is None else scale.contiguous(),
            keys,
            values,
            index.contiguous(),
            weights.contiguous(),
            blend.contiguous(),
            *(query if gradient is None else gradient.contiguous() for gradient in gradients),
            *results,
            k,
            keys.stride(0),
            values.stride(0),
            WIDTH=width,
            VALUE_WIDTH=value_width,
            METRIC=metric,
            HAS_SCORES=grad_scores is not None,
            HAS_WEIGHTS=grad_weights is not None,
            HAS_LSE=grad_lse is not None,
            HAS_BLEND=grad_blend is not None,
            NEEDS_QUERY=needs_query,
            NEEDS_KEYS=needs_keys,
            NEEDS_VALUES=needs_values,
            BLOCK_K=choose_block(k, columns, value_columns),
            BLOCK_D=columns,
            BLOCK_V=value_columns,
        )
    return results


def _allocate_gradients(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    needs_query: bool,
    needs_keys: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, k = index.shape
    return (
        query.new_empty(query.shape if needs_query else (0,)),
        query.new_empty(count if needs_query and scale is not None else 0),
        query.new_empty(count, k),
        keys.new_empty(count * k if needs_keys else 0, keys.shape[1]),
        values.new_empty(count * k if needs_values else 0, values.shape[1]),
    )


@read_rows_backward.register_fake
def _(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    weights: Tensor,
    blend: Tensor,
    grad_scores: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    grad_blend: Tensor | None,
    metric: str,
    needs_query: bool,
    needs_keys: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _allocate_gradients(query, scale, keys, values, index, needs_query, needs_keys, needs_values)


@torch.library.custom_op("softdb::cuda_sum_by_row", mutates_args=())
def sum_by_row(
    rows: Tensor,
    order: Tensor,
    coefficients: Tensor,
    vectors: Tensor,
    scale: Tensor | None,
    table: Tensor,
    metric: str,
) -> Tensor:  # (N, width)
    """Compute the gradient of a table from gradients of gathered rows.

    Equal to ``zeros_like(table).index_add(0, index.flatten(), coefficients[..., None] * vectors[:, None])`` for metric
    "dot"; otherwise to the gradient of the keys of a metric, where coefficients are the gradients of the scores. The
    sums are in float32, in ascending order of the entries: the same call gives the same bits.

    Args:
        rows: The index, flattened and sorted, (M k,); -1 is padding.
        order: Entry of the flattened index at each place of ``rows``, (M k,).
        coefficients: (M, k) float32.
        vectors: Queries, or gradients of weighted sums, (M, width) float32.
        scale: Scales, (M,), for l2.
        table: Keys, or values, (N, width).
        metric: Name of the metric; "dot" for values.
    """
    out = torch.zeros_like(table, memory_format=torch.contiguous_format)
    if rows.numel():
        table = with_unit_stride(table)
        columns = pad_width(table.shape[1])
        with on_device(vectors):
            _sum_by_row_kernel[(len(rows),)](
                rows,
                order,
                coefficients.contiguous(),
                vectors.contiguous(),
                vectors if scale is None else scale.contiguous(),
                table,
                out,
                len(rows),
                coefficients.shape[1],
                table.stride(0),
                WIDTH=table.shape[1],
                METRIC=metric,
                BLOCK_E=BLOCK_ENTRIES,
                BLOCK_D=columns,
                num_warps=2 if columns <= 128 else 4,
            )
    return out


@sum_by_row.register_fake
def _(
    rows: Tensor,
    order: Tensor,
    coefficients: Tensor,
    vectors: Tensor,
    scale: Tensor | None,
    table: Tensor,
    metric: str,
) -> Tensor:
    return torch.empty_like(table, memory_format=torch.contiguous_format)
