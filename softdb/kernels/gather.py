"""Rows gathered by number, their scores and blends, and the gradients of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.attributes import kept_property
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.table.gradients import row_sparse

__all__ = [
    "Places",
    "blend_at",
    "blend_back",
    "gather_rows",
    "gathered_scores",
    "products_at",
    "scores_at",
    "weighted_sum",
]


class Places:
    """Rows of a table, by number, -1 at padding: (M, k), to be gathered from one table or several."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.missing = numbers < 0
        self.padded = bool(self.missing.any())

    @property
    def valid(self) -> Tensor:
        """Numbers that can be looked up, 0 at padding."""
        return self.numbers.clamp(min=0) if self.padded else self.numbers

    @kept_property
    def distinct(self) -> tuple[Tensor, Tensor]:
        """Each number once, ascending, and which of them each entry is; without padding, flat."""
        rows, place = self.numbers[~self.missing].unique(return_inverse=True)
        return rows, place


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
        ctx.places = places
        ctx.table_shape, ctx.table_dtype = table.shape, table.dtype
        return _gather(table, places, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        places = ctx.places
        rows, place = places.distinct
        grad = grads[0][~places.missing] if places.padded else grads[0].flatten(0, -2)
        summed = grad.new_zeros(len(rows), ctx.table_shape[-1]).index_add(0, place, grad)
        return row_sparse(rows, summed.to(ctx.table_dtype), ctx.table_shape), None, None


def _gather(table: Tensor, places: Places, dtype: torch.dtype) -> Tensor:  # (N, d), (M, k) -> (M, k, d)
    """``table[places]``, 0 at padding: nothing that stands in some row there may come through, be it NaN."""
    rows = table.index_select(0, places.valid.flatten()).view(*places.numbers.shape, table.shape[-1]).to(dtype)
    return rows.masked_fill(places.missing.unsqueeze(-1), 0.0) if places.padded else rows


def gather_rows(table: Tensor, places: Places, dtype: torch.dtype, *, sparse: bool) -> Tensor:
    """``table[places].to(dtype)``, 0 at padding; with ``sparse`` the gradient is a coalesced COO of the rows read."""
    if sparse and table.requires_grad and torch.is_grad_enabled():
        rows: Tensor = _GatherRows.apply(table, places, dtype)  # type: ignore[no-untyped-call]
        return rows
    return _gather(table, places, dtype)


def gathered_scores(query: Tensor, keys: Tensor, spec: ReadSpec) -> Tensor:  # (M, w), (M, k, d) -> (M, k)
    """Scores of prepared queries with each its own k keys, differentiable; equal keys have equal scores."""
    return _row_products(spec.operand(keys), query).to(spec.dtype)


def scores_at(query: Tensor, keys: Tensor, numbers: Tensor, spec: ReadSpec) -> Tensor:  # (M, w), (N, d) -> (M, k)
    """Scores of prepared queries with the keys at (M, k) ``numbers``, -inf at -1; no gradient, and no (M, k, d)."""
    scores = query.new_empty(numbers.shape, dtype=spec.dtype)
    for part, rows in _gathered(keys, numbers.clamp(min=0), spec.tiling):
        scores[part] = gathered_scores(query[part], rows, spec)
    return scores.masked_fill_(numbers < 0, -torch.inf)


def products_at(query: Tensor, table: Tensor, numbers: Tensor) -> Tensor:  # (M, d), (N, d), (M, k) -> (M, k)
    """Products of queries with the rows at ``numbers``, none of them -1; no gradient, and no (M, k, d)."""
    products = query.new_empty(numbers.shape)
    for part, rows in _gathered(table, numbers, Tiling.for_device(table.device)):
        products[part] = _row_products(rows.to(query.dtype), query[part])
    return products


def _row_products(rows: Tensor, query: Tensor) -> Tensor:  # (M, k, d), (M, d) -> (M, k)
    """Products of queries with each its own rows.

    Not by `torch.bmm`, which may round the last of an odd number of rows differently, so that equal rows would not tie.
    The bits of this sum depend on the width alone.
    """
    return (rows * query.unsqueeze(1)).sum(-1)


def _gathered(  # (N, d), (M, k)
    table: Tensor, numbers: Tensor, tiling: Tiling
) -> Iterator[tuple[slice, Tensor]]:
    """``table[numbers]``, a few queries' (m, k, d) at a time, in memory that is used again."""
    count, k = numbers.shape
    step = max(1, tiling.gathered // max(1, k * table.shape[-1]))
    buffer = table.new_empty(min(step, count) * k, table.shape[-1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        wanted = numbers[part].flatten()
        rows = torch.index_select(table, 0, wanted, out=buffer[: len(wanted)])
        yield part, rows.view(-1, k, table.shape[-1])


def blend_at(weights: Tensor, values: Tensor, numbers: Tensor) -> Tensor:  # (M, k), (N, dv), (M, k) -> (M, dv)
    """The weighted sum of the values at ``numbers``, none of them -1; no gradient, and no (M, k, dv)."""
    count, k = numbers.shape
    tiling = Tiling.for_device(values.device)
    run = tiling.sum_rows
    if values.dtype == weights.dtype and k <= run:
        return F.embedding_bag(numbers, values, per_sample_weights=weights, mode="sum")
    if values.dtype == weights.dtype:
        starts = torch.arange(0, k, run, device=numbers.device)
        bags = (torch.arange(count, device=numbers.device).unsqueeze(-1) * k + starts).flatten()
        flat = weights.flatten()
        sums = F.embedding_bag(numbers.flatten(), values, bags, per_sample_weights=flat, mode="sum")
        return sums.view(count, len(starts), values.shape[-1]).sum(1)
    blend = weights.new_empty(count, values.shape[-1])
    for part, rows in _gathered(values, numbers, tiling):
        blend[part] = weighted_sum(weights[part], rows.to(weights.dtype))
    return blend


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:  # (M, k), (M, k, dv) -> (M, dv)
    """``(weights[..., None] * rows).sum(1)``, in sums over few enough rows; differentiable."""
    length = Tiling.for_device(rows.device).sum_rows
    sums = torch.bmm(weights[:, :length].unsqueeze(1), rows[:, :length]).squeeze(1)
    for start in range(length, weights.shape[1], length):
        run = slice(start, start + length)
        sums = sums + torch.bmm(weights[:, run].unsqueeze(1), rows[:, run]).squeeze(1)
    return sums


def blend_back(
    gradient: Tensor,  # (M, dv)
    weights: Tensor,  # (M, k)
    values: Tensor,  # (N, dv)
    numbers: Tensor,  # (M, k)
    *,
    sparse: bool,
) -> Tensor:
    """The gradient of ``values`` in `blend_at`; no (M, k, dv). With ``sparse``, of the rows in ``numbers`` alone."""
    ordered, order = numbers.flatten().sort()
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    # Each row's gradient is a blend in turn, of what has come back to the queries that saw it.
    summed = F.embedding_bag(
        order // numbers.shape[1],
        gradient.contiguous(),
        counts.cumsum(0) - counts,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    ).to(values.dtype)
    if sparse:
        return row_sparse(rows, summed, values.shape)
    return torch.zeros_like(values, memory_format=torch.contiguous_format).index_copy_(0, rows, summed)
