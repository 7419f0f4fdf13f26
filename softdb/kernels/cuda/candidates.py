"""Differentiable reads of gathered rows on a GPU.

Forward and backward are one kernel each. Backward gathers the rows again, from the tables as they were at the read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.kernels import gather as blocks
from softdb.kernels.cuda.gather import blend_rows, read_rows, score_candidates
from softdb.kernels.cuda.gather_backward import read_rows_backward, sum_by_row
from softdb.kernels.cuda.metric import can_score, is_supported, restore_query
from softdb.kernels.gather import CandidateRead, GatherIndex, make_uncoalesced
from softdb.kernels.spec import ReadSpec, disable_autocast
from softdb.scoring.normalizers import softmax
from softdb.table.gradients import make_row_sparse
from softdb.table.kept_rows import RowCopies
from softdb.transforms import check_not_batched

__all__ = ["blend_at", "blend_at_backward", "dot_at", "read_at", "score_at"]

# Query, scale, keys, values and offsets.
Operands = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


def score_at(query: Tensor, keys: Tensor, index: Tensor, spec: ReadSpec) -> Tensor:  # (M, w), (N, d) -> (M, k)
    """Score the keys at ``index``, as `softdb.kernels.gather.score_at`."""
    if not can_score(spec, keys) or len(keys) == 0:
        return blocks.score_at(query, keys, index, spec)
    with torch.no_grad():
        scores: Tensor = score_candidates(*restore_query(query, spec), keys, index, spec.metric)
    return scores


def dot_at(query: Tensor, table: Tensor, index: Tensor) -> Tensor:  # (M, d), (N, d), (M, k) -> (M, k)
    """Compute dot products with rows, as `softdb.kernels.gather.dot_at`."""
    if not is_supported(query, table):
        return blocks.dot_at(query, table, index)
    products: Tensor = score_candidates(query.float(), None, table, index, "dot")
    return products.to(query.dtype)


def blend_at(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:  # (M, k), (N, dv), (M, k) -> (M, dv)
    """Compute weighted sums of values, as `softdb.kernels.gather.blend_at`."""
    if not is_supported(values) or weights.dtype == torch.float64:
        return blocks.blend_at(weights, values, index)
    blend: Tensor = blend_rows(weights.float(), values, index)
    return blend.to(weights.dtype)


def blend_at_backward(
    gradient: Tensor,  # (M, dv)
    weights: Tensor,  # (M, k)
    values: Tensor,  # (N, dv)
    index: Tensor,  # (M, k)
    *,
    sparse: bool,
) -> Tensor:
    """Compute the gradient of ``values`` in `blend_at`.

    Equal to `softdb.kernels.gather.blend_at_backward`. With ``sparse``, the gradient has an entry for each element of
    ``index`` and is not coalesced.
    """
    if not is_supported(values) or weights.dtype == torch.float64:
        return blocks.blend_at_backward(gradient, weights, values, index, sparse=sparse)
    if sparse:
        entries = (weights.unsqueeze(-1) * gradient.unsqueeze(1)).flatten(0, 1).to(values.dtype)
        return make_row_sparse(index.flatten(), entries, values.shape, is_coalesced=False)
    rows, order = index.flatten().sort(stable=True)
    whole: Tensor = sum_by_row(rows, order, weights.float(), gradient.float(), None, values, "dot")
    return whole


class _ReadAt(torch.autograd.Function):
    """Read of gathered rows; backward gathers them again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        scale: Tensor | None,
        keys: Tensor,
        values: Tensor,
        offsets: Tensor | None,
        places: GatherIndex,
        spec: ReadSpec,
        sparse: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, weights, lse, blend = read_rows(query, scale, keys, values, places.index, offsets, spec.metric)
        ctx.save_for_backward(query, scale, keys, values, offsets, weights, blend)
        ctx.places, ctx.spec, ctx.sparse = places, spec, sparse
        ctx.set_materialize_grads(False)
        return scores, weights, lse, blend

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        check_not_batched(grads)
        saved = ctx.saved_tensors  # activation checkpointing allows one access only
        needs: tuple[bool, ...] = ctx.needs_input_grad[:5]
        nothing = [None] * 3
        if all(gradient is None for gradient in grads):
            return *([None] * 5), *nothing
        if torch.is_grad_enabled():  # for second derivatives
            return *_differentiate_in_graph(saved[:5], ctx.places, ctx.spec.metric, grads, needs), *nothing

        def compute(spec: ReadSpec, copies: RowCopies | None) -> list[Tensor | None]:
            query, scale, keys, values, _, weights, blend = saved
            if copies is not None:
                keys = copies.restore_rows("keys", keys, slice(0, len(keys)))
                values = copies.restore_rows("values", values, slice(0, len(values)))
            operands = query, scale, keys, values
            return _differentiate(operands, weights, blend, ctx.places, spec.metric, grads, needs, sparse=ctx.sparse)

        with torch.no_grad(), disable_autocast(saved[0].device):
            return *ctx.spec.compute_at_read(compute, saved[2], saved[3]), *nothing


def _differentiate(
    operands: tuple[Tensor, Tensor | None, Tensor, Tensor],
    weights: Tensor,
    blend: Tensor,
    places: GatherIndex,
    metric: str,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    *,
    sparse: bool,
) -> list[Tensor | None]:
    """Compute the gradients of the operands; None where they are not needed."""
    query, scale, keys, values = operands
    index, grad_blend = places.index, grads[3]
    needs_values = needs[3] and grad_blend is not None
    grad_query, grad_scale, grad_totals, key_entries, value_entries = read_rows_backward(
        *operands,
        index,
        weights,
        blend,
        *grads,
        metric,
        needs[0] or needs[1],
        needs[2] and sparse,
        needs_values and sparse,
    )
    grad_keys = grad_values = None
    if sparse:
        if needs[2]:
            grad_keys = make_uncoalesced(key_entries.view(*index.shape, keys.shape[1]), places, keys.dtype, keys.shape)
        if needs_values:
            grad_values = make_uncoalesced(
                value_entries.view(*index.shape, values.shape[1]), places, values.dtype, values.shape
            )
    elif needs[2] or needs_values:
        rows, order = index.flatten().sort(stable=True)
        if needs[2]:
            grad_keys = sum_by_row(rows, order, grad_totals, query, scale, keys, metric)
        if needs_values and grad_blend is not None:
            grad_values = sum_by_row(rows, order, weights, grad_blend, None, values, "dot")
    return [
        grad_query if needs[0] else None,
        grad_scale if needs[1] else None,
        grad_keys,
        grad_values,
        grad_totals if needs[4] else None,
    ]


def _differentiate_in_graph(
    operands: Operands,
    places: GatherIndex,
    metric: str,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Compute the gradients of `_ReadAt` by operations that have second derivatives."""
    outputs = _read_in_torch(operands, places, metric)
    pairs = [(output, gradient) for output, gradient in zip(outputs, grads, strict=True) if gradient is not None]
    wanted = [tensor for tensor, need in zip(operands, needs, strict=True) if need and tensor is not None]
    used, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(used, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _read_in_torch(operands: Operands, places: GatherIndex, metric: str) -> CandidateRead:
    """Compute `read_rows` by operations of torch, which allocate the gathered rows."""
    query, scale, keys, values, offsets = operands
    gathered = keys[places.clamped].to(query.dtype)  # (M, k, d)
    if scale is not None:
        scores = -scale.unsqueeze(-1) * (query.unsqueeze(1) - gathered).square().sum(-1)
    else:
        gathered = F.normalize(gathered, dim=-1) if metric == "cosine" else gathered
        scores = (gathered * query.unsqueeze(1)).sum(-1)
    if offsets is not None:
        scores = scores + offsets
    scores = scores.masked_fill(places.is_padding, -torch.inf)
    weights, lse = softmax(scores)
    blend = (weights.unsqueeze(-1) * values[places.clamped].to(query.dtype)).sum(1)
    return CandidateRead(scores, weights, lse, blend)


def read_at(
    query: Tensor,  # (M, w)
    keys: Tensor,  # (N, d)
    values: Tensor,  # (N, dv)
    places: GatherIndex,
    spec: ReadSpec,
    offsets: Tensor | None,  # (M, k)
    *,
    sparse: bool,
) -> CandidateRead | None:
    """Read gathered rows by one kernel; differentiable.

    See `softdb.kernels.backend.ReadAt`.
    """
    if not can_score(spec, keys, values) or len(keys) == 0:
        return None
    points, scale = restore_query(query, spec)
    operands: Operands = points, scale, keys, values, offsets
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        return CandidateRead(*_ReadAt.apply(*operands, places, spec, sparse))
    return CandidateRead(*read_rows(points, scale, keys, values, places.index, offsets, spec.metric))
