"""Exact top-k over blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.filters import Block
from softdb.kernels.blocks.products import BlockLoader, TileProduct
from softdb.kernels.gather import score_at
from softdb.kernels.spec import ReadSpec, disable_autocast
from softdb.kernels.tiling import GROUP_COLUMNS
from softdb.pending_checks import is_deferred

__all__ = ["RunningTopK", "block_top_k", "exact_top_k", "select_dense_block", "top_k", "two_stage_top_k"]


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., k)
    """Compute ``torch.topk(scores, k)`` with ties broken by the lowest index.

    Among equal scores, lower indices are preferred and come first. On a GPU, the host does not wait to find out whether
    scores tie.
    """
    width = scores.shape[-1]
    k = min(k, width)
    if is_deferred(scores):
        return _top_k_by_score_and_index(scores, k)
    values, index = scores.topk(min(k + 1, width), dim=-1)
    equal = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] > -torch.inf)
    values, index = values[..., :k], index[..., :k]
    if bool(equal.any()):
        index = index.contiguous()
        # topk returns equal scores in any order. If the (k+1)-th score equals the k-th, topk selects any of them.
        tied = equal[..., : k - 1].any(-1).nonzero(as_tuple=True)
        ascending = index[tied].sort(dim=-1).values
        order = scores[tied].gather(-1, ascending).sort(dim=-1, descending=True, stable=True).indices
        index[tied] = ascending.gather(-1, order)
        if k < width:
            cut = equal[..., k - 1].nonzero(as_tuple=True)
            index[cut] = scores[cut].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return values, index


def _top_k_by_score_and_index(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `top_k` by sort keys that include the index, so that no keys tie.

    An int64 holds the bits of a float32 score and 32 bits for the index. Scores in float64 are sorted.
    """
    if scores.dtype == torch.float64:
        index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return scores.gather(-1, index), index
    # Adding 0 turns -0 into 0, which ties with it. NaN is larger than all numbers, as for torch.topk.
    numbers = (scores.float() + 0.0).masked_fill(scores.isnan(), torch.nan)
    bits = numbers.view(torch.int32)
    # The bits of negative numbers are in descending order, except for the sign.
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = scores.shape[-1] - 1
    keys = (ascending.long() << 32) | (last - torch.arange(last + 1, device=scores.device))
    index = last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return scores.gather(-1, index), index


def two_stage_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (g, b, C) -> (g, b, min(k, C))
    """Compute `top_k` among the columns of the k best groups of 32 columns.

    Groups are ordered by their maximum, then by lowest index. The k best groups contain the k best columns. Proof:
    suppose that one of the k best columns is in another group. Then each of the k best groups has a maximum that is
    larger than that column, or equal and at a lower index. These maxima are k better columns, a contradiction.
    """
    width = scores.shape[-1]
    groups = width // GROUP_COLUMNS
    if groups <= 2 * k:
        return top_k(scores, k)
    whole = groups * GROUP_COLUMNS
    maxima = scores[..., :whole].unflatten(-1, (groups, GROUP_COLUMNS)).amax(-1)
    chosen = top_k(maxima, k)[1].sort(dim=-1).values  # (g, b, k), ascending so that columns are ascending too
    columns = (chosen.unsqueeze(-1) * GROUP_COLUMNS + torch.arange(GROUP_COLUMNS, device=scores.device)).flatten(-2)
    if whole < width:
        rest = torch.arange(whole, width, device=scores.device)
        columns = torch.cat([columns, rest.expand(*columns.shape[:-1], -1)], dim=-1)
    values, place = top_k(scores.gather(-1, columns), k)
    return values, columns.gather(-1, place)


class RunningTopK:
    """Top k rows of each query among the blocks so far, best first; (G, B, k)."""

    def __init__(self, groups: int, queries: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = k
        self._started: set[tuple[int, int]] = set()  # first group and first query of the tiles so far
        self.scores = torch.full((groups, queries, k), -torch.inf, dtype=dtype, device=device)
        self.rows = torch.full((groups, queries, k), -1, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, groups: slice, queries: slice, block: Block) -> None:
        """Add the scores of a block whose rows follow all earlier ones."""
        values, _, found = block_top_k(scores, block, self.k)
        if self._is_first(groups, queries):
            self.scores[groups, queries], self.rows[groups, queries] = values, found
            return
        # Earlier rows come first, so that the lowest row wins a tie.
        values = torch.cat([self.scores[groups, queries], values.to(self.scores.dtype)], dim=-1)
        found = torch.cat([self.rows[groups, queries], found], dim=-1)
        values, order = top_k(values, self.k)
        self.scores[groups, queries] = values
        self.rows[groups, queries] = found.gather(-1, order)

    def _is_first(self, groups: slice, queries: slice) -> bool:
        """Return whether these queries have not seen a row yet; on a GPU, not had a block."""
        if not is_deferred(self.rows):
            return not bool((self.rows[groups, queries, 0] >= 0).any())
        tile = groups.start, queries.start
        is_first = tile not in self._started
        self._started.add(tile)
        return is_first


def exact_top_k(
    query: Tensor,  # (B, w)
    keys: Tensor,  # (N, d)
    spec: ReadSpec,
    k: int,
) -> tuple[Tensor, Tensor]:  # (B, k), (B, k)
    """Compute ``topk(query @ keys.T, k)`` with ties broken by the lowest row.

    The result has no gradient. The scores, (B, N), are never allocated as a whole.

    Args:
        query: Prepared queries.
        keys: The keys as stored.
        spec: The metric, filters, dtype and bias. Noise is not added.
        k: Number of rows to find.

    Returns:
        The scores and slots of the rows, best first; -inf and -1 where a query may see fewer than k rows.
    """
    with torch.no_grad(), disable_autocast(query.device):
        query, keys = query.detach()[None], keys.detach()[None]
        block = select_dense_block(query.shape[1], spec, spec.count_copied_elements(keys), k)
        if block is not None:
            group, queries = slice(0, 1), slice(0, query.shape[1])
            operand = spec.prepare_keys(BlockLoader(keys, spec.dtype).load(group, block))
            scores = TileProduct(exact_ties=True)(query, operand)
            spec.add_bias_(scores, block, group, queries)
            block.hide(scores, group, queries, -torch.inf)
            found, _, rows = block_top_k(scores[0].to(spec.dtype), block, k)
            return found, rows
        if spec.selection.count <= spec.tiling.one_pass_groups * GROUP_COLUMNS * k:
            return _top_k_in_one_pass(query, keys, spec, k)
        return _top_k_in_two_passes(query, keys, spec, k)


def _top_k_in_one_pass(query: Tensor, keys: Tensor, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor]:
    """Merge the top k of every tile."""
    batch = query.shape[1]
    best = RunningTopK(1, batch, k, spec.dtype, query.device)
    product = TileProduct(exact_ties=True)
    key_loader = BlockLoader(keys, spec.dtype)
    tiles = spec.choose_tiles(query, spec.count_copied_elements(keys), k)
    for groups, block, slices in spec.iterate_tiles(tiles, 1, batch):
        operand = spec.prepare_keys(key_loader.load(groups, block))
        for queries in slices:
            scores = product(query[:, queries], operand)
            spec.add_bias_(scores, block, groups, queries)
            block.hide(scores, groups, queries, -torch.inf)
            # Compare scores in the dtype in which they are returned: scores that round to the same number tie.
            best.add(scores.to(spec.dtype), groups, queries, block)
    return best.scores[0], best.rows[0]


def _top_k_in_two_passes(query: Tensor, keys: Tensor, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor]:
    """Find the groups of 32 rows with the best maxima, then score their rows.

    The first pass computes and keeps the maxima, (B, N / 32). The k best groups contain the k best rows: see
    `two_stage_top_k`. Two passes are faster than one if these 32 k rows are few in comparison with N.
    """
    batch, count = query.shape[1], spec.selection.count
    height = max(1, spec.tiling.max_group_maxima * GROUP_COLUMNS // count)
    parts = [slice(start, min(start + height, batch)) for start in range(0, batch, height)]
    if batch == 0:
        return query.new_empty(0, k, dtype=spec.dtype), torch.empty(0, k, dtype=torch.int64, device=query.device)
    found = torch.cat([_columns_of_best_groups(query, keys, spec, part, k) for part in parts])  # (B, 32 k)
    if spec.selection.visited is not None:
        found = torch.where(found < 0, found, spec.selection.visited[found.clamp(min=0)])
    found.masked_fill_(~spec.selection.is_visible(found), -1)
    scores = score_at(query[0], keys[0], found, spec)
    if spec.bias is not None:
        scores += spec.bias.at(found, groups=1)
    scores, place = top_k(scores, k)
    return scores, found.gather(-1, place).masked_fill_(scores == -torch.inf, -1)


def _columns_of_best_groups(
    query: Tensor,  # (1, B, w)
    keys: Tensor,  # (1, N, d)
    spec: ReadSpec,
    part: slice,
    k: int,
) -> Tensor:  # (b, 32 k), ascending
    """Find the rows of the k groups with the best maxima, for a slice of queries.

    Returns:
        Positions in the pass, -1 beyond its last row.
    """
    count = spec.selection.count
    groups = -(-count // GROUP_COLUMNS)
    maxima = torch.full((part.stop - part.start, groups), -torch.inf, dtype=spec.dtype, device=query.device)
    product = TileProduct(exact_ties=True)
    key_loader = BlockLoader(keys, spec.dtype)
    tiles = spec.choose_tiles(query[:, part], spec.count_copied_elements(keys))
    for group, block, slices in spec.iterate_tiles(tiles, 1, len(maxima)):
        operand = spec.prepare_keys(key_loader.load(group, block))
        for queries in slices:
            batch_queries = slice(part.start + queries.start, part.start + queries.stop)
            scores = product(query[:, batch_queries], operand)
            spec.add_bias_(scores, block, group, batch_queries)
            block.hide(scores, group, batch_queries, -torch.inf)
            scores = scores[0].to(spec.dtype)
            first, whole = block.start // GROUP_COLUMNS, scores.shape[1] // GROUP_COLUMNS
            columns = whole * GROUP_COLUMNS
            in_groups = scores[:, :columns].unflatten(1, (whole, GROUP_COLUMNS))
            maxima[queries, first : first + whole] = in_groups.amax(-1)
            if columns < scores.shape[1]:
                maxima[queries, first + whole] = scores[:, columns:].amax(-1)
    chosen = top_k(maxima, k)[1].sort(dim=-1).values
    columns_of_chosen = chosen.unsqueeze(-1) * GROUP_COLUMNS + torch.arange(GROUP_COLUMNS, device=query.device)
    found = columns_of_chosen.flatten(1)
    return found.masked_fill_(found >= count, -1)


def block_top_k(scores: Tensor, block: Block, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the top k of the scores of a block.

    Returns:
        The scores (..., k), the columns (..., up to k) and the slots (..., k); -inf and -1 at padding.
    """
    found, columns = two_stage_top_k(scores, k)
    rows = block.slots(columns).masked_fill_(found == -torch.inf, -1)
    padding = (0, k - columns.shape[-1])
    if padding[1]:
        found, rows = F.pad(found, padding, value=-torch.inf), F.pad(rows, padding, value=-1)
    return found, columns, rows


def select_dense_block(queries: int, spec: ReadSpec, copied_per_row: int, k: int) -> Block | None:
    """Return all rows as one block, if a dense read of them is faster.

    A dense read is faster if the scores make one small tile and few elements have to be copied.
    """
    count, tiling = spec.selection.count, spec.tiling
    if not 0 < queries * count <= tiling.max_dense_scores or count * copied_per_row > tiling.copied_elements:
        return None
    if k and count % GROUP_COLUMNS and count > tiling.max_padded_rows:  # the block would have to be padded
        return None
    return spec.selection.block(0, count)
