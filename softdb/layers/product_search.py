"""Exact top-k search of a `ProductKeyMemory`: the best sums of two scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.transforms import is_exporting

__all__ = ["PairSearch", "find_best_pairs"]


@dataclass(frozen=True)
class PairSearch:
    """Sizes of the search of a `ProductKeyMemory`.

    Attributes:
        max_scores: Maximum number of scores that are allocated at a time.
        group_columns: Number of columns per group, in a top-k of two stages.
        min_columns_per_k: Ratio of columns to k from which two stages are faster than one `torch.topk`.
    """

    max_scores: int = 2**22
    group_columns: int = 4
    min_columns_per_k: int = 8


def find_best_pairs(queries: Tensor, keys: Tensor, k: int, sizes: PairSearch) -> tuple[Tensor, Tensor]:
    """Find the k best sums of a score from each list, and their rows i * n + j.

    Args:
        queries: (M, heads, 2, half).
        keys: (heads, 2, n, half).
        k: Number of pairs per query, at most n².
        sizes: Sizes of the parts of the search.

    Returns:
        Scores and rows, both (M, heads, k), best first.
    """
    heads, n = queries.shape[1], keys.shape[2]
    first, second = _list_candidate_ranks(k, min(k, n), queries.device)
    results = []
    # An exported graph accepts batches of any size, but has a fixed number of parts, so it uses one part.
    for part in [queries] if is_exporting() else queries.split(max(1, sizes.max_scores // (2 * heads * n))):
        # One product per list of keys, (2 heads, m, n).
        halves = torch.bmm(part.flatten(1, 2).transpose(0, 1), keys.flatten(0, 1).mT).unflatten(0, (heads, 2))
        with torch.no_grad():
            best, columns = _top_k_in_groups(halves, min(k, n), sizes)  # (heads, 2, m, k)
            positions = (best[:, 0, :, first] + best[:, 1, :, second]).topk(k).indices  # (heads, m, k)
            columns = columns.gather(-1, torch.stack([first[positions], second[positions]], dim=1))
            rows = columns[:, 0] * n + columns[:, 1]
        scores = halves.gather(-1, columns).sum(1)
        results.append((scores.transpose(0, 1), rows.transpose(0, 1)))
    scores, rows = (torch.cat(parts) for parts in zip(*results, strict=True))
    return scores, rows


def _top_k_in_groups(scores: Tensor, k: int, sizes: PairSearch) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., k)
    """Compute ``topk(scores, k)`` in two stages: the best groups, then their columns.

    The k groups with the largest maxima contain the k largest scores. Unlike in `softdb.kernels.blocks.topk`, the order
    of equal scores is undefined. So no step depends on the data, and torch.compile and torch.export trace one graph.
    """
    width = scores.shape[-1]
    groups = width // sizes.group_columns
    if width % sizes.group_columns or width < sizes.min_columns_per_k * k:
        values, columns = scores.topk(k)
        return values, columns
    # Column c is in group c % groups, since a maximum over slices is faster to compute than over adjacent columns.
    best_groups = scores.unflatten(-1, (sizes.group_columns, groups)).amax(-2).topk(k, sorted=False).indices
    columns = (best_groups.unsqueeze(-1) + torch.arange(0, width, groups, device=scores.device)).flatten(-2)
    values, positions = scores.gather(-1, columns).topk(k)
    return values, columns.gather(-1, positions)


def _list_candidate_ranks(k: int, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """List the pairs of ranks that can be among the k best sums.

    Ranks are counted from 0 and are below ``limit``. A pair of ranks (i, j) is left out if (i + 1)(j + 1) > k: then at
    least k other pairs, those with lower or equal ranks, have a sum that is at least as large.
    """
    # The pairs are computed on the device: a copy of a list from the CPU would wait for it.
    sizes = [min(limit, k // (i + 1)) for i in range(limit)]
    counts = (torch.full((limit,), k, device=device) // torch.arange(1, limit + 1, device=device)).clamp(max=limit)
    ends = counts.cumsum(0)
    number = torch.arange(sum(sizes), device=device)
    first = torch.searchsorted(ends, number, right=True)
    return first, number - (ends - counts).index_select(0, first)
