"""The backward pass of an exact read, by the same blocks and products as forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdb.errors import SecondDerivativeError, StaleReadError
from softdb.filters import Block
from softdb.kernels.cpu.products import (
    BlockRows,
    Product,
    add_product,
    exponentials,
    grouped,
    put_product,
    repeated_queries,
    split_rows,
)
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiles

__all__ = ["Saved", "check_same_rule", "gradients_in_blocks", "once_only"]


class Saved(NamedTuple):
    """What backward needs, as in `Blend`.

    Not the log-sum-exp: beside a score of 10,000 it has lost the digits that make the weights sum to 1. The mask is
    among it for torch to notice when it is written to.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    blend: Tensor
    total: Tensor
    shift: Tensor | None
    seen: Tensor | None
    mask: Tensor | None


def gradients_in_blocks(
    saved: Saved,
    spec: ReadSpec,
    group_count: int,
    tiles: Tiles,
    grad_blend: Tensor | None,
    grad_lse: Tensor | None,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of query, keys and values: d score = weight · (grad_blend · value − grad_blend · blend + grad_lse)."""
    query, keys, values, blend = (grouped(group_count, tensor) for tensor in saved[:4])
    total, shift, seen = saved.total, saved.shift, saved.seen
    grad_blend = None if grad_blend is None else grouped(group_count, grad_blend)
    grad_lse = None if grad_lse is None else grouped(group_count, grad_lse)
    needs_query, needs_keys, needs_values = needs[:3]
    needs_values = needs_values and grad_blend is not None
    count, height = query.shape[:2]
    grad_query = torch.zeros_like(query) if needs_query else None
    grad_keys = _empty_gradient(keys, spec, height) if needs_keys else None
    grad_values = _empty_gradient(values, spec, height) if needs_values else None
    # The division by the total is done to the small factors.
    delta = torch.zeros_like(total) if grad_lse is None else -grad_lse
    if grad_blend is not None:
        delta = (delta + (grad_blend * blend).sum(-1)) / total
        grad_blend = grad_blend / total.unsqueeze(-1)
    else:
        delta = delta / total
    product, value_product = Product(tiles.tall, tiles.even), Product(tiles.tall)
    key_rows, value_rows = BlockRows(keys, spec.dtype), BlockRows(values, spec.dtype)
    again = None if seen is None else torch.zeros_like(seen)
    for groups, block, slices in spec.visit(tiles, count, height):
        rows = key_rows.block(groups, block)  # (g, C, d)
        operand = spec.operand(rows)  # (g, C, w)
        block_values = value_rows.block(groups, block)  # (g, C, dv)
        if again is not None:
            again += block.fingerprint()
        parts = spec.partitions(tiles, groups, block)
        operand, block_values = split_rows(operand, parts), split_rows(block_values, parts)
        grad_operand = None if grad_keys is None else _room(grad_keys, groups, block, operand)
        grad_block_values = None if grad_values is None else _room(grad_values, groups, block, block_values)
        for queries in slices:
            first = queries.start == 0
            part = repeated_queries(query[groups, queries], parts)
            scores = product(part, operand)  # (n, b, c), as forward made them
            spec.disturb(scores, block, groups, queries)
            if shift is not None:
                block.hide(scores, groups, queries, -torch.inf)
            weights = exponentials(scores, None if shift is None else shift[groups, queries], spec.dtype)
            if shift is None:
                block.hide(weights, groups, queries, 0.0)
            upstream = None if grad_blend is None else repeated_queries(grad_blend[groups, queries], parts)
            if grad_block_values is not None and upstream is not None:
                put_product(grad_block_values, weights.mT, upstream, first)
            if not (needs_query or needs_keys):
                continue
            minus = delta[groups, queries].unsqueeze(-1)
            if upstream is None:
                grad_scores = weights.mul_(-minus)
            else:
                grad_scores = value_product(upstream, block_values).sub_(minus).mul_(weights)
            grad_scores = grad_scores.to(query.dtype)
            if grad_query is not None:
                add_product(grad_query[groups, queries], grad_scores, operand, spec.tiling.sum_rows)
            if grad_operand is not None:
                put_product(grad_operand, grad_scores.mT, part, first)
        if grad_keys is not None and grad_operand is not None:
            grad_operand = grad_operand.view(-1, block.count, grad_operand.shape[-1])
            _write(grad_keys, groups, block, spec.operand_backward(grad_operand, rows))
        if grad_values is not None and grad_block_values is not None:
            _write(grad_values, groups, block, grad_block_values.view(-1, block.count, values.shape[-1]))
    if seen is not None and again is not None:
        check_same_rule(seen, again)
    return [None if grad is None else grad.flatten(0, 1) for grad in (grad_query, grad_keys, grad_values)]


def check_same_rule(seen: Tensor, again: Tensor) -> None:
    """Raise if a callable ``where`` shows other rows in backward than it did in forward."""
    if not torch.equal(seen, again):
        raise StaleReadError(
            "where: the callable gives another answer in backward than it gave in forward, so gradients would be "
            "wrong; do not change the tensors it uses between a read and its backward"
        )


def _empty_gradient(table: Tensor, spec: ReadSpec, queries: int) -> Tensor:
    """Memory for a gradient; 0 for every row that no block covers."""
    selection = spec.selection
    if queries == 0 or selection.shared is not None or selection.visit is not None:
        return torch.zeros_like(table)
    gradient = torch.empty_like(table)
    gradient[:, selection.count :] = 0.0
    return gradient


def _room(table: Tensor, groups: slice, block: Block, like: Tensor) -> Tensor:
    """Memory like ``like``, not filled: where a block lies in ``table`` if that is possible."""
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
        if place.data_ptr() != part.data_ptr():
            place.copy_(part)
    else:
        table[groups].index_copy_(1, block.rows, part.to(table.dtype))


class _OnceOnly(torch.autograd.Function):
    """Its first argument, with a graph in which a second derivative is an error rather than silently zero."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise SecondDerivativeError(
            "an exact read has no second derivative; for a few rows, use softdb.functional.topk_read with all of them "
            "as candidates, which has"
        )


def once_only(results: list[Tensor | None], *inputs: Tensor | None) -> list[Tensor | None]:
    """The gradients of a read, in a graph that refuses a second derivative if one is being made."""
    if not torch.is_grad_enabled():
        return results
    given = [tensor for tensor in inputs if tensor is not None]
    return [None if result is None else _OnceOnly.apply(result, *given) for result in results]  # type: ignore[no-untyped-call]
