"""Forward pass of an exact read, block by block."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.errors import NonFiniteError
from softdb.kernels.blocks.products import (
    MIN_WEIGHT,
    BlockLoader,
    TileProduct,
    add_product,
    exponentiate,
    repeat_queries,
    split_groups,
    split_rows,
    zero_where_hidden,
)
from softdb.kernels.blocks.topk import RunningTopK
from softdb.kernels.spec import BestRows, ReadSpec, check_scores
from softdb.kernels.tiling import Tiles
from softdb.pending_checks import is_deferred

__all__ = ["read_in_blocks"]

# Bound below which no score overflows.
MAX_SCORE = 1e38


class ForwardResult(NamedTuple):
    """Outputs of an exact read, and what its backward needs.

    Attributes:
        values: Weighted mean of the values, (G B, dv).
        lse: Log-sum-exp of the scores, (G B,).
        total: Sum of exp(score − shift), (G, B); 1 for queries that see no row.
        shift: Number subtracted from the scores, (G, B); None for 0.
        best: Top k rows, or None if k is 0.
        seen: Fingerprint of the rows that a filter rule shows to each query, or None.
    """

    values: Tensor
    lse: Tensor
    total: Tensor
    shift: Tensor | None
    best: BestRows | None
    seen: Tensor | None


def _run_pass(
    query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, k: int, tiles: Tiles, *, shifted: bool = False
) -> ForwardResult:
    """Run one pass over the rows, in tiles that fit in cache.

    A shift is subtracted from the scores from the first block that needs one; with ``shifted``, from the first block.
    """
    count, height = query.shape[:2]
    shape = (count, height)
    total = query.new_zeros(shape, dtype=spec.dtype)
    blend = query.new_zeros((*shape, values.shape[-1]), dtype=spec.dtype)
    shift: Tensor | None = None  # running maximum of the scores, None until it is needed
    lowest = query.new_zeros(())
    best = RunningTopK(count, height, k, spec.dtype, query.device) if k else None
    product = TileProduct(tiles.transposed, tiles.exact_ties)
    key_loader, value_loader = (
        BlockLoader(keys, spec.dtype),
        BlockLoader(values, values.dtype if spec.bf16_matmul else spec.dtype),
    )
    bound_of = spec.make_score_bound(query)
    # Fingerprint of the rows that a rule shows to each query, which backward compares with its own.
    seen = None if spec.selection.rule is None else query.new_zeros(height, dtype=torch.int64)
    # On a GPU, no error is raised for a score of -inf: its row has weight 0.
    checks_lowest = not is_deferred(query)
    for groups, block, slices in spec.iterate_tiles(tiles, count, height):
        rows = key_loader.load(groups, block)  # (g, C, d)
        operand = spec.prepare_keys(rows)  # (g, C, w)
        block_values = value_loader.load(groups, block)  # (g, C, dv)
        if seen is not None:
            seen += block.fingerprint()
        bound = bound_of(operand)
        if shift is None and (shifted or not bound <= spec.tiling.max_unshifted_score):  # also if the bound is NaN
            shift = query.new_zeros(shape).masked_fill_(total == 0, -torch.inf)
        parts = spec.count_partitions(tiles, groups, block)
        operand, block_values = split_rows(operand, parts), split_rows(block_values, parts)
        for queries in slices:
            scores = product(
                repeat_queries(query[groups, queries], parts), operand
            )  # (n, b, c), n groups or partitions
            spec.add_offsets_(scores, block, groups, queries)
            # An infinite key may give a score of -inf, as if it were hidden.
            if checks_lowest and not bound < MAX_SCORE:
                block.hide(scores, groups, queries, torch.inf)
                lowest = torch.minimum(lowest, scores.amin())
            if best is not None or shift is not None:
                block.hide(scores, groups, queries, -torch.inf)
            if best is not None:
                best.add(scores.to(spec.dtype), groups, queries, block)
            if shift is None:
                weights = exponentiate(scores, None, spec.dtype)
                block.hide(weights, groups, queries, 0.0)
            else:
                before, highest = shift[groups, queries], scores.amax(-1)
                after = torch.maximum(before, highest.amax(0, keepdim=True) if parts > 1 else highest)
                finite = zero_where_hidden(after)
                weights = exponentiate(scores, finite, spec.dtype)
                scale = (before - finite).to(spec.dtype).exp_()
                before.copy_(after)
                total[groups, queries] *= scale
                blend[groups, queries] *= scale.unsqueeze(-1)
            sums = weights.sum(-1)
            total[groups, queries] += sums.sum(0, keepdim=True) if parts > 1 else sums
            add_product(blend[groups, queries], weights.to(block_values.dtype), block_values, spec.tiling.max_sum_rows)
    shift = None if shift is None else zero_where_hidden(shift)
    lse = total.flatten().log()
    if shift is not None:
        lse = (lse + shift.flatten()).to(lse.dtype)
    checked = torch.where(lowest == -torch.inf, torch.nan, lse) if checks_lowest else lse
    check_scores(checked, spec.pending_checks, empty=True)
    total.masked_fill_(total == 0, 1.0)
    found = None
    if best is not None:
        relative = None if shift is None else shift.to(spec.dtype)
        weights = exponentiate(best.scores.clone(), relative, spec.dtype).div_(total.unsqueeze(-1))
        found = BestRows(*(tensor.flatten(0, 1) for tensor in (best.scores, weights, best.rows)))
    return ForwardResult(blend.flatten(0, 1) / total.flatten().unsqueeze(-1), lse, total, shift, found, seen)


def read_in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int, k: int, tiles: Tiles
) -> ForwardResult:
    """Read block by block; repeat the pass with a shift if the result is unreliable.

    The first pass subtracts no shift as long as the bound on the scores allows. The pass is repeated if sums overflow
    or underflow, or if the log-sum-exp is outside of its bound. The latter happens after a write to the keys that the
    store did not detect, because the bound comes from the old keys.

    On a GPU, where the host does not wait for results, there is one pass with a shift.
    """
    query, keys, values = split_groups(groups, query), split_groups(groups, keys), split_groups(groups, values)
    if is_deferred(query):
        return _run_pass(query, keys, values, spec, k, tiles, shifted=True)
    with suppress(NonFiniteError):
        read = _run_pass(query, keys, values, spec, k, tiles)
        if read.shift is not None or (_is_lse_plausible(read.lse, spec) and _is_in_range(read)):
            return read
    # The largest key norm is outdated, keys are not finite, or values are very large or small.
    return _run_pass(query, keys, values, replace(spec, max_key_norm=None), k, tiles, shifted=True)


def _is_in_range(read: ForwardResult) -> bool:
    """Return whether sums of weighted values neither overflow nor underflow."""
    if read.values.numel() == 0:
        return True
    sums = (read.values.abs().amax(-1) * read.total.flatten()).masked_fill(read.lse == -torch.inf, 1.0)
    return bool((sums >= 2**17 * MIN_WEIGHT[sums.dtype]).all()) and is_finite(read.values)


def _is_lse_plausible(lse: Tensor, spec: ReadSpec) -> bool:
    """Return whether a log-sum-exp is within the bound for scores without a shift."""
    if lse.numel() == 0 or spec.selection.count == 0:
        return True
    unshifted = spec.tiling.max_unshifted_score
    lowest, highest = -unshifted - 1, unshifted + math.log(spec.selection.count) + 1
    fits = (lse >= lowest) & (lse <= highest)
    if not spec.selection.is_never_empty:
        fits |= lse == -torch.inf
    return bool(fits.all())
