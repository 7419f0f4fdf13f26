"""Exact top-k, over blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.filters import Block
from softdb.kernels.cpu.products import BlockRows, Product
from softdb.kernels.gather import scores_at
from softdb.kernels.spec import ReadSpec, full_precision
from softdb.kernels.tiling import GROUP

__all__ = ["BestSoFar", "best_of_block", "exact_top_k", "small_block", "top_k", "top_of_block"]


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., k)
    """``torch.topk(scores, k)``, except that among equal scores the lowest index wins and comes first."""
    width = scores.shape[-1]
    k = min(k, width)
    values, index = scores.topk(min(k + 1, width), dim=-1)
    equal = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] > -torch.inf)
    values, index = values[..., :k], index[..., :k]
    if bool(equal.any()):
        index = index.contiguous()
        # topk orders equal scores as it likes; and where the first one left out equals the last one kept, it chose.
        tied = equal[..., : k - 1].any(-1).nonzero(as_tuple=True)
        ascending = index[tied].sort(dim=-1).values
        order = scores[tied].gather(-1, ascending).sort(dim=-1, descending=True, stable=True).indices
        index[tied] = ascending.gather(-1, order)
        if k < width:
            cut = equal[..., k - 1].nonzero(as_tuple=True)
            index[cut] = scores[cut].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return values, index


def top_of_block(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (g, b, C) -> (g, b, min(k, C))
    """`top_k` in two stages: the k best groups of 32 columns hold the k best columns.

    Suppose a column of the k best lay in none of the k best groups (by maximum, then lowest index). Each of those
    groups has a maximum that is larger, or as large and further left: k columns that come before it.
    """
    width = scores.shape[-1]
    groups = width // GROUP
    if groups <= 2 * k:
        return top_k(scores, k)
    even = scores[..., : groups * GROUP]
    blocks = even.unflatten(-1, (groups, GROUP))
    chosen = top_k(blocks.amax(-1), k)[1].sort(dim=-1).values  # (g, b, k), ascending so that columns are too
    columns = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=scores.device)).flatten(-2)
    if groups * GROUP < width:
        rest = torch.arange(groups * GROUP, width, device=scores.device)
        columns = torch.cat([columns, rest.expand(*columns.shape[:-1], -1)], dim=-1)
    values, place = top_k(scores.gather(-1, columns), k)
    return values, columns.gather(-1, place)


class BestSoFar:
    """The best k rows of each query so far, best first; (G, B, up to k)."""

    def __init__(self, groups: int, queries: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = k
        self.scores = torch.full((groups, queries, k), -torch.inf, dtype=dtype, device=device)
        self.rows = torch.full((groups, queries, k), -1, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, groups: slice, queries: slice, block: Block) -> None:
        """Take in the scores of a block whose rows come after all that were taken in before."""
        values, _, found = best_of_block(scores, block, self.k)
        if not bool((self.rows[groups, queries, 0] >= 0).any()):  # the first rows that these queries see
            self.scores[groups, queries], self.rows[groups, queries] = values, found
            return
        # Earlier rows stand first, so that the lowest row wins a tie.
        values = torch.cat([self.scores[groups, queries], values.to(self.scores.dtype)], dim=-1)
        found = torch.cat([self.rows[groups, queries], found], dim=-1)
        values, order = top_k(values, self.k)
        self.scores[groups, queries] = values
        self.rows[groups, queries] = found.gather(-1, order)


def exact_top_k(
    query: Tensor,  # (B, w)
    keys: Tensor,  # (N, d)
    spec: ReadSpec,
    k: int,
) -> tuple[Tensor, Tensor]:  # (B, k), (B, k)
    """The k best rows of every query: ``topk(query @ keys.T, k)``, ties to the lowest row; no gradient.

    The (B, N) scores are never held.

    Args:
        query: Prepared queries.
        keys: Keys as stored.
        spec: How they meet; its selection has no whole mask.
        k: How many rows to find.

    Returns:
        Scores and slots, best first; -inf and -1 where fewer than k rows may be seen.
    """
    with torch.no_grad(), full_precision(query.device):
        query, keys = query.detach()[None], keys.detach()[None]
        block = small_block(query.shape[1], spec, spec.copied(keys), k)
        if block is not None:
            everyone, queries = slice(0, 1), slice(0, query.shape[1])
            scores = Product(even=True)(query, spec.operand(BlockRows(keys, spec.dtype).block(everyone, block)))
            block.hide(scores, everyone, queries, -torch.inf)
            found, _, rows = best_of_block(scores[0].to(spec.dtype), block, k)
            return found, rows
        if spec.selection.count <= spec.tiling.few_groups * GROUP * k:
            return _top_k_in_one_pass(query, keys, spec, k)
        return _top_k_in_two_passes(query, keys, spec, k)


def _top_k_in_one_pass(query: Tensor, keys: Tensor, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor]:
    """The best of each tile, joined to the best so far."""
    batch = query.shape[1]
    best = BestSoFar(1, batch, k, spec.dtype, query.device)
    product = Product(even=True)
    key_rows = BlockRows(keys, spec.dtype)
    for groups, block, slices in spec.visit(spec.tiles_of(query, spec.copied(keys), k), 1, batch):
        operand = spec.operand(key_rows.block(groups, block))
        for queries in slices:
            scores = product(query[:, queries], operand)
            block.hide(scores, groups, queries, -torch.inf)
            # Scores are compared as they are reported: two that round to one are a tie.
            best.add(scores.to(spec.dtype), groups, queries, block)
    return best.scores[0], best.rows[0]


def _top_k_in_two_passes(query: Tensor, keys: Tensor, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor]:
    """The best score of every group of 32 rows, (B, N / 32); then the rows of the k best groups once more.

    Those hold the k best rows, as `top_of_block` argues. Worth while where these 32 k rows are few.
    """
    batch, count = query.shape[1], spec.selection.count
    height = max(1, spec.tiling.maxima * GROUP // count)
    parts = [slice(start, min(start + height, batch)) for start in range(0, batch, height)]
    if batch == 0:
        return query.new_empty(0, k, dtype=spec.dtype), torch.empty(0, k, dtype=torch.int64, device=query.device)
    found = torch.cat([_columns_of_best_groups(query, keys, spec, part, k) for part in parts])  # (B, 32 k)
    if spec.selection.visit is not None:
        found = torch.where(found < 0, found, spec.selection.visit[found.clamp(min=0)])
    found.masked_fill_(~spec.selection.allows(found), -1)
    scores, place = top_k(scores_at(query[0], keys[0], found, spec), k)
    return scores, found.gather(-1, place).masked_fill_(scores == -torch.inf, -1)


def _columns_of_best_groups(
    query: Tensor,  # (1, B, w)
    keys: Tensor,  # (1, N, d)
    spec: ReadSpec,
    part: slice,
    k: int,
) -> Tensor:  # (b, 32 k), ascending
    """For some queries, the places in the pass of the rows of the k groups with the best maxima; -1 past the end."""
    count = spec.selection.count
    groups = -(-count // GROUP)
    maxima = torch.full((part.stop - part.start, groups), -torch.inf, dtype=spec.dtype, device=query.device)
    product = Product(even=True)
    key_rows = BlockRows(keys, spec.dtype)
    for chunk, block, slices in spec.visit(spec.tiles_of(query[:, part], spec.copied(keys)), 1, len(maxima)):
        operand = spec.operand(key_rows.block(chunk, block))
        for queries in slices:
            whole = slice(part.start + queries.start, part.start + queries.stop)
            scores = product(query[:, whole], operand)
            block.hide(scores, chunk, whole, -torch.inf)
            scores = scores[0].to(spec.dtype)
            first, even = block.start // GROUP, scores.shape[1] // GROUP
            maxima[queries, first : first + even] = scores[:, : even * GROUP].unflatten(1, (even, GROUP)).amax(-1)
            if even * GROUP < scores.shape[1]:
                maxima[queries, first + even] = scores[:, even * GROUP :].amax(-1)
    chosen = top_k(maxima, k)[1].sort(dim=-1).values
    columns = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=query.device)).flatten(1)
    return columns.masked_fill_(columns >= count, -1)


def best_of_block(scores: Tensor, block: Block, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (..., k) of the best rows, their columns (..., up to k), and their slots (..., k)."""
    found, columns = top_of_block(scores, k)
    rows = block.slots(columns).masked_fill_(found == -torch.inf, -1)
    missing = (0, k - columns.shape[-1])
    if missing[1]:
        found, rows = F.pad(found, missing, value=-torch.inf), F.pad(rows, missing, value=-1)
    return found, columns, rows


def small_block(queries: int, spec: ReadSpec, copied: int, k: int) -> Block | None:
    """All rows as one block, if that makes a small tile for so many queries and little has to be copied."""
    count = spec.selection.count
    if not 0 < queries * count <= spec.tiling.small_scores or count * copied > spec.tiling.copied:
        return None
    if k and count % GROUP and count > spec.tiling.few_rows:  # it would have to be padded
        return None
    return spec.selection.block(0, count)
