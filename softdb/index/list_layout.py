"""How rows lie in the lists of an index: strata for a sample, and the weight to expect in lists not visited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.reading.result import Read

# Rows with a score so far below the best candidates' are taken to score no worse.
FURTHEST = 75.0


@dataclass(frozen=True, eq=False)
class Outline:
    """The rows in the order of the index's lists, and where the lists lie.

    Attributes:
        order: Every slot once, list after list.
        counts: How many slots each list has, (L,).
        means: The mean key of each list, (L, d), or of some of its rows.
    """

    order: Tensor
    counts: Tensor
    means: Tensor

    def among(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """``order`` and ``counts`` of the slots that some query may see."""
        order, counts = self.order, self.counts
        if len(order) < selection.size:  # rows that the lists do not know yet
            order = torch.cat([order, torch.arange(len(order), selection.size, device=order.device)])
            counts = torch.cat([counts[:-1], counts[-1:] + (len(order) - len(self.order))])
        if selection.shared is None:
            return order, counts
        seen = selection.shared[order]
        before = torch.cat([counts.new_zeros(1), seen.cumsum(0)])
        ends = counts.cumsum(0)
        return order[seen], before[ends] - before[ends - counts]


def promise_of(outline: Outline, query: Tensor, spec: ReadSpec, read: Read) -> Tensor:  # (M, w) -> (L,)
    """The weight that a row of each list may have beside the candidates, root mean square over the queries."""
    operand = spec.operand(outline.means)
    some = (read.lse > -torch.inf).nonzero().squeeze(-1)  # the others see no row
    query = query.detach()[some]
    twice = 2 * query  # squares of weights are exponentials of twice the scores
    most = 2 * cast(Tensor, read.scores).detach()[some, -1:].to(query.dtype)  # what is better should be a candidate
    total = 2 * read.lse.detach()[some].unsqueeze(-1).to(query.dtype)
    squares = operand.new_zeros(len(operand))
    height = max(1, Tiling.for_device(operand.device).elements // max(1, len(operand)))
    for start in range(0, len(query), height):
        part = slice(start, start + height)
        doubled = (twice[part] @ operand.T).clamp_(total[part] - FURTHEST, most[part]).sub_(total[part])
        squares += doubled.exp_().sum(0)
    return squares.double().nan_to_num_(nan=0.0, posinf=0.0).sqrt_()
