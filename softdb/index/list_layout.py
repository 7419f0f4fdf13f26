"""Describe how rows lie in the lists of an index, for stratified tail samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.metrics import compute_dtype

__all__ = ["MAX_SCORE_GAP", "ListLayout", "list_importance"]

# Lower bound of a row's score, in nats below the best candidates.
MAX_SCORE_GAP = 75.0

# The mean key of a list is that of this many of its rows.
ROWS_PER_MEAN = 32


@dataclass(frozen=True, eq=False)
class ListLayout:
    """Hold the rows in the order of the index's lists, and the position of each list.

    Attributes:
        order: Every slot once, list after list.
        counts: The number of slots in each list, (L,).
        means: The mean key of each list, (L, d), or of some of its rows.
    """

    order: Tensor
    counts: Tensor
    means: Tensor

    @classmethod
    def from_lists(cls, lists: Tensor, count: int, keys: Tensor) -> ListLayout:  # (n,), (capacity, d)
        """Lay out slots by their list's number, which is ``count`` without a list."""
        order, counts = lists.argsort(stable=True), lists.bincount(minlength=count + 1)
        places = counts.unsqueeze(-1) * torch.arange(ROWS_PER_MEAN, device="cpu") // ROWS_PER_MEAN
        places = places + (counts.cumsum(0) - counts).unsqueeze(-1)
        slots = order[places.clamp_(max=max(0, len(lists) - 1))]
        means = keys[slots.flatten().to(keys.device)].view(*slots.shape, -1).mean(1, dtype=compute_dtype(keys))
        return cls(order.to(keys.device), counts.to(keys.device), means)

    def restrict(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return ``order`` and ``counts`` of the slots that some query may see."""
        order, counts = self.order, self.counts
        if len(order) < selection.size:  # newer rows than the layout, which are in no list
            order = torch.cat([order, torch.arange(len(order), selection.size, device=order.device)])
            counts = torch.cat([counts[:-1], counts[-1:] + (len(order) - len(self.order))])
        if selection.shared is None:
            return order, counts
        seen = selection.shared[order]
        before = torch.cat([counts.new_zeros(1), seen.cumsum(0)])
        ends = counts.cumsum(0)
        return order[seen], before[ends] - before[ends - counts]


def list_importance(  # (M, w), (M, k), (M,) -> (L,)
    layout: ListLayout, query: Tensor, spec: ReadSpec, scores: Tensor, lse: Tensor
) -> Tensor:
    """Estimate the weight of a row of each list outside the candidates.

    Args:
        layout: The lists.
        query: Prepared queries.
        spec: The metric and filters of the read.
        scores: The scores of each query's candidates, best first.
        lse: The log-sum-exp of these.

    Returns:
        The root mean square of the weights over the queries, (L,) float64.
    """
    operand = spec.prepare_keys(layout.means)
    reading = (lse > -torch.inf).nonzero().squeeze(-1)  # the other queries see no row
    query = query.detach()[reading]
    doubled_query = 2 * query  # squares of weights are exponentials of doubled scores
    most = 2 * scores.detach()[reading, -1:].to(query.dtype)  # a better row should be a candidate
    total = 2 * lse.detach()[reading].unsqueeze(-1).to(query.dtype)
    squares = operand.new_zeros(len(operand))
    height = max(1, Tiling.for_device(operand.device).tile_elements // max(1, len(operand)))
    for start in range(0, len(query), height):
        part = slice(start, start + height)
        doubled = (doubled_query[part] @ operand.T).clamp_(total[part] - MAX_SCORE_GAP, most[part]).sub_(total[part])
        squares += doubled.exp_().sum(0)
    return squares.double().nan_to_num_(nan=0.0, posinf=0.0).sqrt_()
