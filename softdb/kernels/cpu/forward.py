"""The forward pass of an exact read, block by block."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.errors import NonFiniteError
from softdb.kernels.cpu.products import (
    SMALLEST_WEIGHT,
    BlockRows,
    Product,
    add_product,
    exponentials,
    grouped,
    repeated_queries,
    split_rows,
    zero_for_hidden,
)
from softdb.kernels.cpu.topk import BestSoFar
from softdb.kernels.spec import BestRows, ReadSpec, check_scores
from softdb.kernels.tiling import Tiles

__all__ = ["read_in_blocks"]

# Where no score can be as large as this, none overflows.
LARGEST = 1e38


class Blend(NamedTuple):
    """What an exact read comes to.

    Attributes:
        values: The weighted mean of the values, (G B, dv).
        lse: The log-sum-exp, (G B,).
        total: The sum of exp(score − shift), 1 where there was nothing, (G, B).
        shift: (G, B); None for 0.
        best: The best rows, if they were asked for.
        seen: What a rule showed each query, as one number.
    """

    values: Tensor
    lse: Tensor
    total: Tensor
    shift: Tensor | None
    best: BestRows | None
    seen: Tensor | None


def _pass(
    query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, k: int, tiles: Tiles, *, shifted: bool = False
) -> Blend:
    """One block of rows after the other, in tiles that fit in cache; with a shift once needed, or from the start."""
    count, height = query.shape[:2]
    shape = (count, height)
    total = query.new_zeros(shape, dtype=spec.dtype)
    blend = query.new_zeros((*shape, values.shape[-1]), dtype=spec.dtype)
    shift: Tensor | None = None  # a running maximum, once it is needed
    lowest = query.new_zeros(())
    best = BestSoFar(count, height, k, spec.dtype, query.device) if k else None
    product = Product(tiles.tall, tiles.even)
    key_rows, value_rows = BlockRows(keys, spec.dtype), BlockRows(values, values.dtype if spec.narrow else spec.dtype)
    bound_of = spec.bound(query)
    # What a rule showed each query, to be compared in backward.
    seen = None if spec.selection.rule is None else query.new_zeros(height, dtype=torch.int64)
    for groups, block, slices in spec.visit(tiles, count, height):
        rows = key_rows.block(groups, block)  # (g, C, d)
        operand = spec.operand(rows)  # (g, C, w)
        block_values = value_rows.block(groups, block)  # (g, C, dv)
        if seen is not None:
            seen += block.fingerprint()
        bound = bound_of(operand)
        if shift is None and (shifted or not bound <= spec.tiling.unshifted):  # nor if it is NaN
            shift = query.new_zeros(shape).masked_fill_(total == 0, -torch.inf)
        parts = spec.partitions(tiles, groups, block)
        operand, block_values = split_rows(operand, parts), split_rows(block_values, parts)
        for queries in slices:
            scores = product(
                repeated_queries(query[groups, queries], parts), operand
            )  # (n, b, c), n groups or partitions
            spec.disturb(scores, block, groups, queries)
            if not bound < LARGEST:  # an infinite key may give a score of -inf, which would pass for hidden
                block.hide(scores, groups, queries, torch.inf)
                lowest = torch.minimum(lowest, scores.amin())
            if best is not None or shift is not None:
                block.hide(scores, groups, queries, -torch.inf)
            if best is not None:
                best.add(scores.to(spec.dtype), groups, queries, block)
            if shift is None:
                weights = exponentials(scores, None, spec.dtype)
                block.hide(weights, groups, queries, 0.0)
            else:
                before, highest = shift[groups, queries], scores.amax(-1)
                after = torch.maximum(before, highest.amax(0, keepdim=True) if parts > 1 else highest)
                finite = zero_for_hidden(after)
                weights = exponentials(scores, finite, spec.dtype)
                scale = (before - finite).to(spec.dtype).exp_()
                before.copy_(after)
                total[groups, queries] *= scale
                blend[groups, queries] *= scale.unsqueeze(-1)
            sums = weights.sum(-1)
            total[groups, queries] += sums.sum(0, keepdim=True) if parts > 1 else sums
            add_product(blend[groups, queries], weights.to(block_values.dtype), block_values, spec.tiling.sum_rows)
    shift = None if shift is None else zero_for_hidden(shift)
    lse = total.flatten().log()
    if shift is not None:
        lse = (lse + shift.flatten()).to(lse.dtype)
    check_scores(torch.where(lowest == -torch.inf, torch.nan, lse), empty=True)
    total.masked_fill_(total == 0, 1.0)
    found = None
    if best is not None:
        relative = None if shift is None else shift.to(spec.dtype)
        shares = exponentials(best.scores.clone(), relative, spec.dtype).div_(total.unsqueeze(-1))
        found = BestRows(*(tensor.flatten(0, 1) for tensor in (best.scores, shares, best.rows)))
    return Blend(blend.flatten(0, 1) / total.flatten().unsqueeze(-1), lse, total, shift, found, seen)


def read_in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int, k: int, tiles: Tiles
) -> Blend:
    """`_pass`, again with a shift where it cannot be trusted without."""
    query, keys, values = grouped(groups, query), grouped(groups, keys), grouped(groups, values)
    with suppress(NonFiniteError):
        read = _pass(query, keys, values, spec, k, tiles)
        if read.shift is not None or (_is_plausible(read.lse, spec) and _is_sizable(read)):
            return read
    # Somebody wrote to the keys and did not say so, or they are not finite indeed, or values are huge or tiny.
    return _pass(query, keys, values, replace(spec, key_norm=None), k, tiles, shifted=True)


def _is_sizable(read: Blend) -> bool:
    """Whether the products of exponentials and values neither overflowed nor came close to underflow."""
    if read.values.numel() == 0:
        return True
    sums = (read.values.abs().amax(-1) * read.total.flatten()).masked_fill(read.lse == -torch.inf, 1.0)
    return bool((sums >= 2**17 * SMALLEST_WEIGHT[sums.dtype]).all()) and is_finite(read.values)


def _is_plausible(lse: Tensor, spec: ReadSpec) -> bool:
    """Whether the log-sum-exp of scores that need no shift is one."""
    if lse.numel() == 0 or spec.selection.count == 0:
        return True
    unshifted = spec.tiling.unshifted
    lowest, highest = -unshifted - 1, unshifted + math.log(spec.selection.count) + 1
    fits = (lse >= lowest) & (lse <= highest)
    if not spec.selection.shows_some_to_all:
        fits |= lse == -torch.inf
    return bool(fits.all())
