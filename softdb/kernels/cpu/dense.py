"""An exact read of few rows at once, whose weights are kept for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb._checks import is_finite
from softdb.filters import Block
from softdb.kernels.cpu.backward import check_same_rule, once_only
from softdb.kernels.cpu.products import Product, cut_weights, grouped, product_in_runs
from softdb.kernels.cpu.topk import best_of_block
from softdb.kernels.spec import BestRows, ReadSpec, check_scores, full_precision
from softdb.kernels.tiling import Tiling

__all__ = ["DenseRead", "read_densely"]


class DenseRead(torch.autograd.Function):
    """The same as `_ExactRead`, where all scores make one small tile: made at once, and the weights are kept.

    For one group the tensors have no dimension for groups.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int, block: Block, k: int
    ) -> tuple[Tensor, Tensor, BestRows | None]:
        """Read, and keep the weights."""
        blend, lse, best, weights = read_densely(query, keys, values, spec, groups, block, k)
        ctx.spec, ctx.groups, ctx.block = spec, groups, block
        ctx.seen = None if spec.selection.rule is None else block.fingerprint()
        # Not with the rest: to activation checkpointing, weights of another size would be an error of its own, though
        # appending rows between a read and its backward is fine.
        ctx.weights = weights
        ctx.save_for_backward(query, keys, values, blend, spec.selection.mask)
        ctx.set_materialize_grads(False)
        return blend, lse, best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Compute the gradients of query, keys and values from the weights."""
        query, keys, values, blend, _ = ctx.saved_tensors
        grad_blend, grad_lse = grads[:2]
        spec, block, weights, groups = ctx.spec, ctx.block, ctx.weights, ctx.groups
        needs_query, needs_keys, needs_values = ctx.needs_input_grad[:3]
        grad_query = grad_keys = grad_values = None
        if grad_blend is None and grad_lse is None:
            return (None,) * 7
        if ctx.seen is not None:
            check_same_rule(ctx.seen, spec.selection.block(0, spec.selection.count).fingerprint())
        with torch.no_grad(), full_precision(query.device):
            if needs_values and grad_blend is not None:
                grad_rows = product_in_runs(weights.mT, _by_group(groups, grad_blend), spec.tiling)
                grad_values = _spread(values, groups, block, grad_rows)
            if needs_query or needs_keys:
                grad_scores = weights
                if grad_blend is not None:
                    delta = (grad_blend * blend).sum(-1, keepdim=True)
                    if grad_lse is not None:
                        delta -= grad_lse.unsqueeze(-1)
                    block_values = _cast(_rows(values, groups, block), spec.dtype)
                    grad_scores = _pairwise(_by_group(groups, grad_blend), block_values, spec.tiling)
                    grad_scores = grad_scores.sub_(_by_group(groups, delta)).mul_(weights)
                elif grad_lse is not None:
                    grad_scores = weights * _by_group(groups, grad_lse.unsqueeze(-1))
                grad_scores = _cast(grad_scores, query.dtype)
                rows = _rows(keys, groups, block)
                if needs_query:
                    grad_query = _flat(groups, product_in_runs(grad_scores, spec.operand(rows), spec.tiling))
                if needs_keys:
                    grad_operand = product_in_runs(grad_scores.mT, _by_group(groups, query), spec.tiling)
                    grad_keys = _spread(keys, groups, block, spec.operand_backward(grad_operand, rows))
        results = once_only([grad_query, grad_keys, grad_values], query, keys, values, *grads)
        return *results, None, None, None, None


def read_densely(
    query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int, block: Block, k: int
) -> tuple[Tensor, Tensor, BestRows | None, Tensor]:
    """Blend, log-sum-exp, best rows and weights."""
    operand = spec.operand(_rows(keys, groups, block))
    query = _by_group(groups, query)
    if k:
        scores = Product(even=True)(*((query[None], operand[None]) if groups == 1 else (query, operand)))
        scores = scores[0] if groups == 1 else scores
    else:
        scores = _pairwise(query, operand, spec.tiling)
    if spec.noise is not None:
        tiles = scores if groups > 1 else scores.unsqueeze(0)
        spec.disturb(tiles, block, slice(0, groups), slice(0, tiles.shape[1]))
    if not is_finite(scores):
        _hide_all(scores, block, 0.0)
        check_scores(scores)
    if block.hides:
        _hide_all(scores, block, -torch.inf)
    # Along whichever dimension lies that way in memory.
    weights = torch.softmax(scores, -1) if scores.is_contiguous() else torch.softmax(scores.mT, -2).mT
    if block.count > spec.tiling.small_sum:  # torch adds up the exponentials of a row one after the other
        weights /= weights.sum(-1, keepdim=True)
    lse = scores.amax(-1) - weights.amax(-1).log()
    if block.hides:
        nothing = lse.isnan()
        weights.masked_fill_(nothing.unsqueeze(-1), 0.0)
        lse.masked_fill_(nothing, -torch.inf)
    if scores.dtype != spec.dtype:
        lse, weights = lse.to(spec.dtype), weights.to(spec.dtype)
    weights = cut_weights(weights)
    blend = _flat(groups, product_in_runs(weights, _cast(_rows(values, groups, block), spec.dtype), spec.tiling))
    lse = _flat(groups, lse)
    if k == 0:
        return blend, lse, None, weights
    found, columns, rows = best_of_block(_cast(scores, spec.dtype), block, k)
    shares = F.pad(weights.gather(-1, columns), (0, k - columns.shape[-1]))
    best = BestRows(_flat(groups, found), _flat(groups, shares), _flat(groups, rows))
    return blend, lse, best, weights


def _pairwise(left: Tensor, right: Tensor, tiling: Tiling) -> Tensor:  # (..., b, d), (..., C, d) -> (..., b, C)
    """``left @ right.mT``, whichever way round is faster."""
    return (right @ left.mT).mT if tiling.is_tall(left.shape[-2], left.shape[-1]) else left @ right.mT


def _by_group(groups: int, tensor: Tensor) -> Tensor:  # (G n, *x) -> (G, n, *x), or (n, *x) for one group
    return tensor if groups == 1 else grouped(groups, tensor)


def _flat(groups: int, tensor: Tensor) -> Tensor:
    """The inverse of `_by_group`; not a view, since those cannot be written to in place."""
    return tensor if groups == 1 else tensor.flatten(0, 1).clone()


def _rows(table: Tensor, groups: int, block: Block) -> Tensor:  # (G N, d) -> (G, C, d)
    table = _by_group(groups, table)
    if isinstance(block.rows, Tensor):
        return table.index_select(-2, block.rows)
    return table if block.count == table.shape[-2] else table.narrow(-2, block.rows.start, block.count)


def _spread(table: Tensor, groups: int, block: Block, part: Tensor) -> Tensor:  # (G, C, d) -> (G N, d)
    """The gradient of a table, from that of the rows of a block."""
    part = _cast(part, table.dtype)
    if isinstance(block.rows, slice) and part.numel() == table.numel():
        return _flat(groups, part)
    gradient = torch.zeros_like(table)
    rows = _by_group(groups, gradient)
    if isinstance(block.rows, slice):
        rows.narrow(-2, block.rows.start, block.count).copy_(part)
    else:
        rows.index_copy_(-2, block.rows, part)
    return gradient


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _hide_all(scores: Tensor, block: Block, value: float) -> None:
    grouped = scores if scores.dim() == 3 else scores.unsqueeze(0)
    block.hide(grouped, slice(0, grouped.shape[0]), slice(0, grouped.shape[1]), value)
