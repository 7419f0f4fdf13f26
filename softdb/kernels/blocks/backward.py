"""Backward pass of an exact read, by the same blocks and products as forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdb.errors import SecondDerivativeError, StaleReadError
from softdb.filters import Block
from softdb.kernels.bias import ScoreBias
from softdb.kernels.blocks.products import (
    BlockLoader,
    TileProduct,
    add_product,
    exponentiate,
    repeat_queries,
    split_groups,
    split_rows,
    write_or_add_product,
)
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiles
from softdb.table.kept_rows import RowCopies

__all__ = ["SavedTensors", "backward_in_blocks", "check_rule_unchanged", "forbid_double_backward"]


class SavedTensors(NamedTuple):
    """Tensors saved for backward; see `ForwardResult`.

    Total and shift are saved instead of the log-sum-exp: if scores are about 10,000, the log-sum-exp has too few digits
    for weights that sum to 1. The mask is saved so that torch detects writes to it.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    blend: Tensor
    total: Tensor
    shift: Tensor | None
    seen: Tensor | None
    mask: Tensor | None


def backward_in_blocks(
    saved: SavedTensors,
    spec: ReadSpec,
    group_count: int,
    tiles: Tiles,
    grad_blend: Tensor | None,
    grad_lse: Tensor | None,
    needs: tuple[bool, ...],
    copies: RowCopies | None = None,
) -> list[Tensor | None]:
    """Compute the gradients of query, keys, values and bias.

    ``grad_score = weight * (grad_blend @ value - grad_blend @ blend + grad_lse)``

    Args:
        saved: The tensors saved by forward.
        spec: The read spec of forward, without its bias.
        group_count: Number of groups.
        tiles: The tiles of forward.
        grad_blend: Gradient of the blend, (G B, dv), or None.
        grad_lse: Gradient of the log-sum-exp, (G B,), or None.
        needs: Whether query, keys, values and bias need a gradient.
        copies: Copies of the rows that have changed since forward, or None.

    Returns:
        The gradients, None where they are not needed.
    """
    tensors = saved.query, saved.keys, saved.values, saved.blend
    query, keys, values, blend = (split_groups(group_count, tensor) for tensor in tensors)
    total, shift, seen = saved.total, saved.shift, saved.seen
    bias = None if saved.bias is None else ScoreBias(saved.bias)
    spec = spec if bias is None else replace(spec, bias=bias)
    grad_blend = None if grad_blend is None else split_groups(group_count, grad_blend)
    grad_lse = None if grad_lse is None else split_groups(group_count, grad_lse)
    needs_query, needs_keys, needs_values, needs_bias = needs[:4]
    needs_values = needs_values and grad_blend is not None
    count, height = query.shape[:2]
    grad_query = torch.zeros_like(query) if needs_query else None
    grad_keys = _empty_gradient(keys, spec, height) if needs_keys else None
    grad_values = _empty_gradient(values, spec, height) if needs_values else None
    grad_bias = torch.zeros_like(saved.bias) if saved.bias is not None and needs_bias else None
    # Divide these factors by the total once, instead of dividing the weights of every block.
    delta = torch.zeros_like(total) if grad_lse is None else -grad_lse
    if grad_blend is not None:
        delta = (delta + (grad_blend * blend).sum(-1)) / total
        grad_blend = grad_blend / total.unsqueeze(-1)
    else:
        delta = delta / total
    product, value_product = TileProduct(tiles.transposed, tiles.exact_ties), TileProduct(tiles.transposed)
    key_loader = BlockLoader(keys, spec.dtype, "keys", copies)
    value_loader = BlockLoader(values, spec.dtype, "values", copies)
    fingerprint = None if seen is None else torch.zeros_like(seen)
    for groups, block, slices in spec.iterate_tiles(tiles, count, height):
        rows = key_loader.load(groups, block)  # (g, C, d)
        operand = spec.prepare_keys(rows)  # (g, C, w)
        block_values = value_loader.load(groups, block)  # (g, C, dv)
        if fingerprint is not None:
            fingerprint += block.fingerprint()
        parts = spec.count_partitions(tiles, groups, block)
        operand, block_values = split_rows(operand, parts), split_rows(block_values, parts)
        grad_operand = None if grad_keys is None else _allocate_block(grad_keys, groups, block, operand)
        grad_block_values = None if grad_values is None else _allocate_block(grad_values, groups, block, block_values)
        for queries in slices:
            first = queries.start == 0
            part = repeat_queries(query[groups, queries], parts)
            scores = product(part, operand)  # (n, b, c), as forward made them
            spec.add_offsets_(scores, block, groups, queries)
            if shift is not None:
                block.hide(scores, groups, queries, -torch.inf)
            weights = exponentiate(scores, None if shift is None else shift[groups, queries], spec.dtype)
            if shift is None:
                block.hide(weights, groups, queries, 0.0)
            upstream = None if grad_blend is None else repeat_queries(grad_blend[groups, queries], parts)
            if grad_block_values is not None and upstream is not None:
                write_or_add_product(grad_block_values, weights.mT, upstream, first)
            if not (needs_query or needs_keys or needs_bias):
                continue
            minus = delta[groups, queries].unsqueeze(-1)
            if upstream is None:
                grad_scores = weights.mul_(-minus)
            else:
                grad_scores = value_product(upstream, block_values).sub_(minus).mul_(weights)
            if bias is not None and grad_bias is not None:
                bias.add_gradient_(grad_bias, grad_scores, block, groups, queries)
            grad_scores = grad_scores.to(query.dtype)
            if grad_query is not None:
                add_product(grad_query[groups, queries], grad_scores, operand, spec.tiling.max_sum_rows)
            if grad_operand is not None:
                write_or_add_product(grad_operand, grad_scores.mT, part, first)
        if grad_keys is not None and grad_operand is not None:
            grad_operand = grad_operand.view(-1, block.count, grad_operand.shape[-1])
            _write(grad_keys, groups, block, spec.prepare_keys_backward(grad_operand, rows))
        if grad_values is not None and grad_block_values is not None:
            grad_block_values = grad_block_values.view(groups.stop - groups.start, block.count, values.shape[-1])
            _write(grad_values, groups, block, grad_block_values)
    if seen is not None and fingerprint is not None:
        check_rule_unchanged(seen, fingerprint)
    return [*(None if grad is None else grad.flatten(0, 1) for grad in (grad_query, grad_keys, grad_values)), grad_bias]


def check_rule_unchanged(seen: Tensor, fingerprint: Tensor) -> None:
    """Raise if a callable ``where`` gives another mask in backward than in forward.

    Raises:
        StaleReadError: The fingerprints of the masks differ.
    """
    if not torch.equal(seen, fingerprint):
        raise StaleReadError(
            "where: expected the callable to return the same rows in backward as in forward, got other rows, so the "
            "gradients would be wrong; do not change the tensors that it uses between a read and its backward"
        )


def _empty_gradient(table: Tensor, spec: ReadSpec, queries: int) -> Tensor:
    """Allocate a gradient, with zeros for every row that no block covers."""
    selection = spec.selection
    if queries == 0 or selection.shared is not None or selection.visited is not None:
        return torch.zeros_like(table)
    gradient = torch.empty_like(table)
    gradient[:, selection.count :] = 0.0
    return gradient


def _allocate_block(table: Tensor, groups: slice, block: Block, like: Tensor) -> Tensor:
    """Return uninitialized memory for the gradient of a block.

    It is a view of ``table`` where shape and dtype allow.
    """
    if (
        isinstance(block.rows, slice)
        and len(table) == 1
        and (table.dtype, table.shape[-1]) == (like.dtype, like.shape[-1])
    ):
        return table[groups, block.rows].view_as(like)
    return torch.empty_like(like)


def _write(table: Tensor, groups: slice, block: Block, part: Tensor) -> None:
    if isinstance(block.rows, slice):
        place = table[groups, block.rows]
        if not torch._C._is_alias_of(place, part):  # type: ignore[attr-defined]  # see `_allocate_block`
            place.copy_(part)
    else:
        table[groups].index_copy_(1, block.rows, part.to(table.dtype))


class _ForbidDoubleBackward(torch.autograd.Function):
    """Identity whose backward raises, because a second derivative would be 0."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise SecondDerivativeError(
            "an exact read has no second derivative; for few rows, use softdb.functional.topk_read with all rows as "
            "candidates, which has one"
        )


def forbid_double_backward(results: list[Tensor | None], *inputs: Tensor | None) -> list[Tensor | None]:
    """Make the backward of gradients raise an error.

    The gradients have a backward only with ``create_graph=True``; otherwise they are returned unchanged.
    """
    if not torch.is_grad_enabled():
        return results
    tensors = [tensor for tensor in inputs if tensor is not None]
    return [None if result is None else _ForbidDoubleBackward.apply(result, *tensors) for result in results]  # type: ignore[no-untyped-call]
