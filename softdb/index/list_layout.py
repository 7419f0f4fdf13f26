"""Describe the lists of an index, for stratified tail samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.metrics import compute_dtype

__all__ = ["MAX_SCORE_GAP", "ListLayout", "list_importance"]

# Scores are clamped to this many nats below the log-sum-exp of the candidates, since exponentials of lower scores are
# close to underflow.
MAX_SCORE_GAP = 75.0

# Number of rows of a list from which its mean key is computed.
ROWS_PER_MEAN = 32


@dataclass(frozen=True, eq=False)
class ListLayout:
    """Slots in the order of the lists of an index.

    The last list contains the slots that are in no list.

    Attributes:
        order: All slots, list by list, (n,).
        counts: Number of slots in each list, (L,).
        means: Mean key of each list or of a sample of its rows, (L, d).
    """

    order: Tensor
    counts: Tensor
    means: Tensor

    @classmethod
    def from_lists(cls, lists: Tensor, count: int, keys: Tensor) -> ListLayout:  # (n,), (capacity, d)
        """Create a layout from the list of each slot.

        A slot without a list has the list number ``count``.
        """
        order, counts = lists.argsort(stable=True), lists.bincount(minlength=count + 1)
        positions = counts.unsqueeze(-1) * torch.arange(ROWS_PER_MEAN, device="cpu") // ROWS_PER_MEAN
        positions = positions + (counts.cumsum(0) - counts).unsqueeze(-1)
        slots = order[positions.clamp_(max=max(0, len(lists) - 1))]
        means = keys[slots.flatten().to(keys.device)].view(*slots.shape, -1).mean(1, dtype=compute_dtype(keys))
        return cls(order.to(keys.device), counts.to(keys.device), means)

    def restrict(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return ``order`` and ``counts`` of the slots that the shared filter allows."""
        order, counts = self.order, self.counts
        if len(order) < selection.size:  # rows that are newer than the layout are in no list
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
    """Estimate for each list the weight of a row that is not a candidate.

    Args:
        layout: The layout of the lists.
        query: Prepared queries.
        spec: Metric and filters of the read.
        scores: Scores of the candidates of each query, best first.
        lse: Log-sum-exp of the candidates' scores.

    Returns:
        Root mean square of the weights over the queries, (L,) float64.
    """
    operand = spec.prepare_keys(layout.means)
    has_rows = (lse > -torch.inf).nonzero().squeeze(-1)  # other queries see no row
    query = query.detach()[has_rows]
    doubled_query = 2 * query  # a squared weight is the exponential of a doubled score
    upper = 2 * scores.detach()[has_rows, -1:].to(query.dtype)  # a row with a higher score should be a candidate
    total = 2 * lse.detach()[has_rows].unsqueeze(-1).to(query.dtype)
    squares = operand.new_zeros(len(operand))
    height = max(1, Tiling.for_device(operand.device).tile_elements // max(1, len(operand)))
    for start in range(0, len(query), height):
        part = slice(start, start + height)
        doubled = (doubled_query[part] @ operand.T).clamp_(total[part] - MAX_SCORE_GAP, upper[part]).sub_(total[part])
        squares += doubled.exp_().sum(0)
    return squares.double().nan_to_num_(nan=0.0, posinf=0.0).sqrt_()
