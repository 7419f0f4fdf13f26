"""Gather rows by index, and compute their scores, weighted sums and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.attributes import lock_free_cached_property
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.pending_checks import is_deferred
from softdb.table.gradients import make_row_sparse

__all__ = [
    "CandidateRead",
    "GatherIndex",
    "blend_at",
    "blend_at_backward",
    "dot_at",
    "gather_rows",
    "make_uncoalesced",
    "score_at",
    "score_rows",
    "weighted_sum",
]


class CandidateRead(NamedTuple):
    """Softmax read of gathered rows.

    Attributes:
        scores: Scores, (M, k), -inf at padding.
        weights: Softmax of the scores, (M, k), 0 at padding.
        lse: Log-sum-exp of the scores, (M,).
        values: Weighted sum of the values, (M, dv).
    """

    scores: Tensor
    weights: Tensor
    lse: Tensor
    values: Tensor


class GatherIndex:
    """Index of rows to gather from one table or from several.

    Args:
        index: Row positions, (M, k); -1 is padding.
        is_full: Whether the caller knows that there is no padding.

    Attributes:
        index: Row positions, (M, k).
        is_padding: (M, k) bool.
        has_padding: Whether any position may be padding. On a GPU, the host does not wait to find out.
    """

    def __init__(self, index: Tensor, *, is_full: bool = False) -> None:
        self.index = index
        self.is_padding = index < 0
        self.has_padding = not is_full and (is_deferred(index) or bool(self.is_padding.any()))

    @property
    def clamped(self) -> Tensor:
        """Row positions with 0 at padding, (M, k)."""
        return self.index.clamp(min=0) if self.has_padding else self.index

    @lock_free_cached_property
    def unique(self) -> tuple[Tensor, Tensor]:
        """Unique row positions, ascending, and the place of each entry among them.

        Padding is left out. The places are one-dimensional, in the order of the entries.
        """
        rows, inverse = self.index[~self.is_padding].unique(return_inverse=True)
        return rows, inverse


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: GatherIndex, dtype: torch.dtype) -> Tensor:
        ctx.index = index
        ctx.table_shape, ctx.table_dtype = table.shape, table.dtype
        return _gather(table, index, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        index = ctx.index
        if is_deferred(index.index):
            return make_uncoalesced(grads[0], index, ctx.table_dtype, ctx.table_shape), None, None
        rows, inverse = index.unique
        grad = grads[0][~index.is_padding] if index.has_padding else grads[0].flatten(0, -2)
        summed = grad.new_zeros(len(rows), ctx.table_shape[-1]).index_add(0, inverse, grad)
        return make_row_sparse(rows, summed.to(ctx.table_dtype), ctx.table_shape), None, None


def make_uncoalesced(grad: Tensor, index: GatherIndex, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Create the row-sparse gradient of gathered rows, one entry for each position.

    The host does not wait for the number of distinct rows.
    """
    rows, values = index.index.flatten(), grad.to(dtype).flatten(0, -2)
    if index.has_padding and len(rows):
        # Padding adds 0 to the highest row that was gathered, so that no other row has a gradient. If all positions are
        # padding, it adds 0 to row 0.
        values = values.masked_fill(index.is_padding.view(-1, 1), 0.0)
        rows = torch.where(rows < 0, rows.amax().clamp(min=0), rows)
    return make_row_sparse(rows, values, shape, is_coalesced=False)


def _gather(table: Tensor, index: GatherIndex, dtype: torch.dtype) -> Tensor:  # (N, d), (M, k) -> (M, k, d)
    """Compute ``table[index]``, 0 at padding, even where row 0 is NaN."""
    rows = table.index_select(0, index.clamped.flatten()).view(*index.index.shape, table.shape[-1]).to(dtype)
    return rows.masked_fill(index.is_padding.unsqueeze(-1), 0.0) if index.has_padding else rows


def gather_rows(table: Tensor, index: GatherIndex, dtype: torch.dtype, *, sparse: bool) -> Tensor:
    """Compute ``table[index].to(dtype)``, 0 at padding.

    With ``sparse`` the gradient of ``table`` is a COO tensor of the gathered rows, coalesced except on a GPU.
    """
    if sparse and table.requires_grad and torch.is_grad_enabled():
        rows: Tensor = _GatherRows.apply(table, index, dtype)  # type: ignore[no-untyped-call]
        return rows
    return _gather(table, index, dtype)


def score_rows(query: Tensor, keys: Tensor, spec: ReadSpec) -> Tensor:  # (M, w), (M, k, d) -> (M, k)
    """Score gathered keys by prepared queries; differentiable.

    Equal keys have bitwise equal scores.
    """
    return _dot_rows(spec.prepare_keys(keys), query).to(spec.dtype)


def score_at(query: Tensor, keys: Tensor, index: Tensor, spec: ReadSpec) -> Tensor:  # (M, w), (N, d) -> (M, k)
    """Score the keys at (M, k) ``index`` by prepared queries.

    The scores have no gradient and are -inf where the index is -1. The gathered keys, (M, k, d), are never allocated as
    a whole.
    """
    scores = query.new_empty(index.shape, dtype=spec.dtype)
    for part, rows in _iterate_gathered(keys, index.clamp(min=0), spec.tiling):
        scores[part] = score_rows(query[part], rows, spec)
    return scores.masked_fill_(index < 0, -torch.inf)


def dot_at(query: Tensor, table: Tensor, index: Tensor) -> Tensor:  # (M, d), (N, d), (M, k) -> (M, k)
    """Compute dot products of queries with the rows at ``index``.

    The products have no gradient. The index must not contain -1. The gathered rows, (M, k, d), are never allocated as a
    whole.
    """
    products = query.new_empty(index.shape)
    for part, rows in _iterate_gathered(table, index, Tiling.for_device(table.device)):
        products[part] = _dot_rows(rows.to(query.dtype), query[part])
    return products


def _dot_rows(rows: Tensor, query: Tensor) -> Tensor:  # (M, k, d), (M, d) -> (M, k)
    """Compute dot products of each query with its own rows.

    The bits of this sum depend only on the width, so equal rows tie. `torch.bmm` may round the last of an odd number of
    rows differently.
    """
    return (rows * query.unsqueeze(1)).sum(-1)


def _iterate_gathered(  # (N, d), (M, k)
    table: Tensor, index: Tensor, tiling: Tiling
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the queries, and their rows ``table[index]``, (m, k, d).

    All slices share one buffer: the next slice overwrites the rows.
    """
    count, k = index.shape
    step = max(1, tiling.gathered_elements // max(1, k * table.shape[-1]))
    buffer = table.new_empty(min(step, count) * k, table.shape[-1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        wanted = index[part].flatten()
        rows = torch.index_select(table, 0, wanted, out=buffer[: len(wanted)])
        yield part, rows.view(-1, k, table.shape[-1])


def blend_at(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:  # (M, k), (N, dv), (M, k) -> (M, dv)
    """Compute the weighted sum of the values at ``index``.

    The sum has no gradient. The index must not contain -1. The gathered values, (M, k, dv), are never allocated as a
    whole.
    """
    count, k = index.shape
    tiling = Tiling.for_device(values.device)
    run = tiling.max_sum_rows
    if values.dtype == weights.dtype and k <= run:
        return F.embedding_bag(index, values, per_sample_weights=weights, mode="sum")
    if values.dtype == weights.dtype:
        starts = torch.arange(0, k, run, device=index.device)
        bags = (torch.arange(count, device=index.device).unsqueeze(-1) * k + starts).flatten()
        flat = weights.flatten()
        sums = F.embedding_bag(index.flatten(), values, bags, per_sample_weights=flat, mode="sum")
        return sums.view(count, len(starts), values.shape[-1]).sum(1)
    blend = weights.new_empty(count, values.shape[-1])
    for part, rows in _iterate_gathered(values, index, tiling):
        blend[part] = weighted_sum(weights[part], rows.to(weights.dtype))
    return blend


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:  # (M, k), (M, k, dv) -> (M, dv)
    """Compute ``(weights[..., None] * rows).sum(1)``; differentiable.

    Each product sums over at most ``Tiling.max_sum_rows`` rows, which bounds its rounding error.
    """
    run = Tiling.for_device(rows.device).max_sum_rows
    sums = torch.bmm(weights[:, :run].unsqueeze(1), rows[:, :run]).squeeze(1)
    for start in range(run, weights.shape[1], run):
        part = slice(start, start + run)
        sums = sums + torch.bmm(weights[:, part].unsqueeze(1), rows[:, part]).squeeze(1)
    return sums


def blend_at_backward(
    gradient: Tensor,  # (M, dv)
    weights: Tensor,  # (M, k)
    values: Tensor,  # (N, dv)
    index: Tensor,  # (M, k)
    *,
    sparse: bool,
) -> Tensor:
    """Compute the gradient of ``values`` in `blend_at`.

    With ``sparse``, the gradient is a coalesced COO tensor of the rows at ``index``. A tensor (M, k, dv) is never
    allocated.
    """
    ordered, order = index.flatten().sort()
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    # The gradient of a row is the weighted sum of the output gradients of the queries that gathered the row.
    summed = F.embedding_bag(
        order // index.shape[1],
        gradient.contiguous(),
        counts.cumsum(0) - counts,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    ).to(values.dtype)
    if sparse:
        return make_row_sparse(rows, summed, values.shape)
    return torch.zeros_like(values, memory_format=torch.contiguous_format).index_copy_(0, rows, summed)
