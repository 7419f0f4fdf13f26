"""Exact read of few rows at once, with the weights saved for backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb._checks import is_finite
from softdb.filters import Block
from softdb.kernels.bias import ScoreBias
from softdb.kernels.blocks.backward import check_rule_unchanged, forbid_double_backward
from softdb.kernels.blocks.products import (
    TileProduct,
    matmul_in_runs,
    split_groups,
    zero_hidden_rows,
    zero_tiny_weights_,
)
from softdb.kernels.blocks.topk import block_top_k
from softdb.kernels.spec import BestRows, ReadSpec, check_scores, disable_autocast
from softdb.kernels.tiling import Tiling
from softdb.pending_checks import is_deferred
from softdb.table.kept_rows import RowCopies

__all__ = ["DenseRead", "read_dense"]


class DenseRead(torch.autograd.Function):
    """Exact read whose scores make one small tile; backward uses saved weights.

    The result is that of `softdb.kernels.blocks.exact.exact_read`. With one group, tensors have no dimension for
    groups.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        spec: ReadSpec,
        groups: int,
        block: Block,
        k: int,
    ) -> tuple[Tensor, Tensor, BestRows | None]:
        """Read the rows, and save the weights."""
        blend, lse, best, weights = read_dense(query, keys, values, spec, groups, block, k)
        ctx.spec, ctx.groups, ctx.block = spec if bias is None else replace(spec, bias=None), groups, block
        ctx.seen = None if spec.selection.rule is None else block.fingerprint()
        # Do not use save_for_backward: under activation checkpointing, it raises if the recomputed tensor has another
        # size. The weights have another size if rows are appended between a read and its backward, which is allowed.
        ctx.weights = weights
        ctx.save_for_backward(query, keys, values, bias, blend, spec.selection.mask)
        ctx.set_materialize_grads(False)
        return blend, lse, best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Compute the gradients of query, keys, values and bias from the weights."""
        query, keys, values, bias, blend, _ = ctx.saved_tensors
        grad_blend, grad_lse = grads[:2]
        block, weights, groups, seen = ctx.block, ctx.weights, ctx.groups, ctx.seen
        needs_query, needs_keys, needs_values, needs_bias = ctx.needs_input_grad[:4]
        if grad_blend is None and grad_lse is None:
            return (None,) * 8

        def compute(spec: ReadSpec, copies: RowCopies | None) -> list[Tensor | None]:
            grad_query = grad_keys = grad_values = grad_bias = None
            if seen is not None:
                check_rule_unchanged(seen, spec.selection.block(0, spec.selection.count).fingerprint())  # type: ignore[union-attr]
            if needs_values and grad_blend is not None:
                grad_rows = matmul_in_runs(weights.mT, _by_group(groups, grad_blend), spec.tiling)
                grad_values = _scatter_rows(values, groups, block, grad_rows)
            if needs_query or needs_keys or needs_bias:
                grad_scores = weights
                if grad_blend is not None:
                    delta = (grad_blend * blend).sum(-1, keepdim=True)
                    if grad_lse is not None:
                        delta -= grad_lse.unsqueeze(-1)
                    block_values = _select_rows(values, groups, block)
                    if copies is not None:
                        block_values = copies.restore_rows("values", block_values, block.rows)
                    block_values = _cast(zero_hidden_rows(block_values, block), spec.dtype)
                    grad_scores = _pairwise(_by_group(groups, grad_blend), block_values, spec.tiling)
                    grad_scores = grad_scores.sub_(_by_group(groups, delta)).mul_(weights)
                elif grad_lse is not None:
                    grad_scores = weights * _by_group(groups, grad_lse.unsqueeze(-1))
                if needs_bias:
                    grad_bias = torch.zeros_like(bias)
                    tiles = grad_scores if grad_scores.dim() == 3 else grad_scores.unsqueeze(0)
                    everything = slice(0, groups), slice(0, tiles.shape[1])
                    ScoreBias(bias).add_gradient_(grad_bias, tiles, block, *everything)
                grad_scores = _cast(grad_scores, query.dtype)
                rows = _select_rows(keys, groups, block)
                if copies is not None:
                    rows = copies.restore_rows("keys", rows, block.rows)
                rows = zero_hidden_rows(rows, block)
                if needs_query:
                    grad_query = _flatten(groups, matmul_in_runs(grad_scores, spec.prepare_keys(rows), spec.tiling))
                if needs_keys:
                    grad_operand = matmul_in_runs(grad_scores.mT, _by_group(groups, query), spec.tiling)
                    grad_keys = _scatter_rows(keys, groups, block, spec.prepare_keys_backward(grad_operand, rows))
            return [grad_query, grad_keys, grad_values, grad_bias]

        with torch.no_grad(), disable_autocast(query.device):
            results = ctx.spec.compute_at_read(compute, keys, values)
        results = forbid_double_backward(results, query, keys, values, bias, *grads)
        return *results, None, None, None, None


def read_dense(
    query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int, block: Block, k: int
) -> tuple[Tensor, Tensor, BestRows | None, Tensor]:
    """Compute the blend, log-sum-exp, best rows and weights of a read."""
    operand = spec.prepare_keys(zero_hidden_rows(_select_rows(keys, groups, block), block))
    query = _by_group(groups, query)
    if k:
        scores = TileProduct(exact_ties=True)(*((query[None], operand[None]) if groups == 1 else (query, operand)))
        scores = scores[0] if groups == 1 else scores
    else:
        scores = _pairwise(query, operand, spec.tiling)
    if spec.noise is not None or spec.bias is not None:
        tiles = scores if groups > 1 else scores.unsqueeze(0)
        spec.add_offsets_(tiles, block, slice(0, groups), slice(0, tiles.shape[1]))
    deferred = is_deferred(scores)
    if not deferred and not is_finite(scores):
        _hide_all(scores, block, 0.0)
        check_scores(scores)
    if block.has_hidden:
        _hide_all(scores, block, -torch.inf)
    # Transposed tiles are transposed back, so that the softmax runs over a contiguous tensor.
    weights = torch.softmax(scores, -1) if scores.is_contiguous() else torch.softmax(scores.mT, -2).mT
    if block.count > spec.tiling.max_dense_sum_rows:  # torch sums the exponentials of a row sequentially
        weights /= weights.sum(-1, keepdim=True)
    largest = scores.amax(-1)
    lse = largest - weights.amax(-1).log()
    if deferred:
        check_scores(lse.masked_fill(largest == -torch.inf, 0.0), spec.pending_checks)
    if block.has_hidden or deferred:
        sees_nothing = largest == -torch.inf
        weights.masked_fill_(sees_nothing.unsqueeze(-1), 0.0)
        lse.masked_fill_(sees_nothing, -torch.inf)
    if scores.dtype != spec.dtype:
        lse, weights = lse.to(spec.dtype), weights.to(spec.dtype)
    weights = zero_tiny_weights_(weights)
    rows_of_values = _cast(zero_hidden_rows(_select_rows(values, groups, block), block), spec.dtype)
    blend = _flatten(groups, matmul_in_runs(weights, rows_of_values, spec.tiling))
    lse = _flatten(groups, lse)
    if k == 0:
        return blend, lse, None, weights
    found, columns, rows = block_top_k(_cast(scores, spec.dtype), block, k)
    best_weights = F.pad(weights.gather(-1, columns), (0, k - columns.shape[-1]))
    best = BestRows(_flatten(groups, found), _flatten(groups, best_weights), _flatten(groups, rows))
    return blend, lse, best, weights


def _pairwise(left: Tensor, right: Tensor, tiling: Tiling) -> Tensor:  # (..., b, d), (..., C, d) -> (..., b, C)
    """Compute ``left @ right.mT``, or the transpose of ``right @ left.mT`` if faster."""
    return (right @ left.mT).mT if tiling.is_transposed_faster(left.shape[-2], left.shape[-1]) else left @ right.mT


def _by_group(groups: int, tensor: Tensor) -> Tensor:  # (G n, *x) -> (G, n, *x), or (n, *x) for one group
    return tensor if groups == 1 else split_groups(groups, tensor)


def _flatten(groups: int, tensor: Tensor) -> Tensor:
    """Undo `_by_group`, as a copy.

    Views returned from an `autograd.Function` cannot be written to in place.
    """
    return tensor if groups == 1 else tensor.flatten(0, 1).clone()


def _select_rows(table: Tensor, groups: int, block: Block) -> Tensor:  # (G N, d) -> (G, C, d)
    table = _by_group(groups, table)
    if isinstance(block.rows, Tensor):
        return table.index_select(-2, block.rows)
    return table if block.count == table.shape[-2] else table.narrow(-2, block.rows.start, block.count)


def _scatter_rows(table: Tensor, groups: int, block: Block, part: Tensor) -> Tensor:  # (G, C, d) -> (G N, d)
    """Write the gradient of a block into a gradient of its table."""
    part = _cast(part, table.dtype)
    if isinstance(block.rows, slice) and groups * block.count == len(table):
        return _flatten(groups, part)
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
    tiles = scores if scores.dim() == 3 else scores.unsqueeze(0)
    block.hide(tiles, slice(0, tiles.shape[0]), slice(0, tiles.shape[1]), value)
