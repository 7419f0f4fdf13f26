"""Exact top-k of sums of two scores: the search of a `ProductKeyMemory`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.transforms import is_exporting

__all__ = ["PairSearch", "best_pairs"]


@dataclass(frozen=True)
class PairSearch:
    """Sizes of the search of a `ProductKeyMemory`.

    Attributes:
        scores: How many scores of product keys are held at a time.
        group: How many columns a group has, in a top-k in two stages.
        columns_per_best: From this many columns for each of the k best on, two stages are faster than `torch.topk`.
    """

    scores: int = 2**22
    group: int = 4
    columns_per_best: int = 8


def best_pairs(queries: Tensor, keys: Tensor, k: int, sizes: PairSearch) -> tuple[Tensor, Tensor]:
    """Find the k best sums of two products, and the rows i * n + j of their pairs.

    Args:
        queries: (M, heads, 2, half).
        keys: (heads, 2, n, half).
        k: How many, at most n².
        sizes: How the search is cut.

    Returns:
        Scores and rows, both (M, heads, k), best first.
    """
    heads, n = queries.shape[1], keys.shape[2]
    first, second = _candidate_ranks(k, min(k, n), queries.device)
    found = []
    # An exported graph takes batches of any size, but has a fixed number of parts.
    for part in [queries] if is_exporting() else queries.split(max(1, sizes.scores // (2 * heads * n))):
        # Products of these queries with a list at a time, (2 heads, m, n).
        halves = torch.bmm(part.flatten(1, 2).transpose(0, 1), keys.flatten(0, 1).mT).unflatten(0, (heads, 2))
        with torch.no_grad():
            best, columns = _top_k_untied(halves, min(k, n), sizes)  # (heads, 2, m, k)
            place = (best[:, 0, :, first] + best[:, 1, :, second]).topk(k).indices  # (heads, m, k)
            columns = columns.gather(-1, torch.stack([first[place], second[place]], dim=1))
            rows = columns[:, 0] * n + columns[:, 1]
        scores = halves.gather(-1, columns).sum(1)
        found.append((scores.transpose(0, 1), rows.transpose(0, 1)))
    scores, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, rows


def _top_k_untied(scores: Tensor, k: int, sizes: PairSearch) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., k)
    """Find ``topk(scores, k)``: the k groups with the best maxima hold the k best.

    Other than `softdb.kernels.cpu.topk`, it leaves the order of equal scores undefined, so that no step depends on
    the data and torch.compile and torch.export trace it as one graph.
    """
    width = scores.shape[-1]
    groups = width // sizes.group
    if width % sizes.group or width < sizes.columns_per_best * k:
        values, columns = scores.topk(k)
        return values, columns
    # Column c is in group c % groups: maxima of whole slices are faster than those of neighbours.
    chosen = scores.unflatten(-1, (sizes.group, groups)).amax(-2).topk(k, sorted=False).indices
    columns = (chosen.unsqueeze(-1) + torch.arange(0, width, groups, device=scores.device)).flatten(-2)
    values, place = scores.gather(-1, columns).topk(k)
    return values, columns.gather(-1, place)


def _candidate_ranks(k: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pairs of ranks that can be among the k best sums.

    Ranks are below ``most``. A pair of ranks (i, j), from 0, has (i + 1)(j + 1) - 1 others that are at least as good.
    """
    pairs = [(i, j) for i in range(most) for j in range(min(most, k // (i + 1)))]
    first, second = torch.tensor(pairs, device=device).unbind(-1)
    return first, second
