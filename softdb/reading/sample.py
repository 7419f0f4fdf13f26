"""The sampled rows that stand for what the candidates leave out, stratified by the lists of the index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.index.list_layout import ListLayout

__all__ = ["Sample"]


# The part of a sample that is drawn as if all rows were alike: where the importance of lists is wrong, the variance is
# no more than twice, 1 / ALIKE times, that of rows drawn at random from all.
ALIKE = 0.5


# Into how many parts a sample is split to tell its variance.
PARTS = 8


# So many rows of a sample are scored at a time.
CHUNK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows that stand for others.

    Attributes:
        slots: (m,): ``parts`` times ``width`` first rows of strata and as many second rows of the same strata, by
            turns; then the rows that stand for themselves.
        factors: How many rows each stands for, (m,): 0 for those that only make parts as wide.
        width: How many strata there are in a part.
        parts: How many parts there are.
    """

    slots: Tensor
    factors: Tensor
    width: int
    parts: int

    @classmethod
    def draw(
        cls,
        selection: Selection,
        count: int,
        device: torch.device,
        generator: torch.Generator | None,
        layout: ListLayout | None = None,
        importance: Tensor | None = None,
    ) -> Sample:
        """Two rows of every stratum, ``count`` in all, rounded up to an even number; all rows if there are no more.

        Strata hold as many rows as each other, or with an ``importance`` of their lists, as much of that.
        """
        if layout is None or selection.visit is not None:
            order = selection.shared_slots.to(device)
            counts, importance = torch.tensor([len(order)], device=device), None
        else:
            order, counts = layout.restrict(selection)
        if count >= len(order):
            return cls(order, torch.ones(len(order), device=device), 0, 0)
        strata = max(1, (count + 1) // 2)
        edges = _edges(counts, importance, strata)
        first, size = edges[:-1], edges.diff()
        small = size <= 2
        alone = torch.cat([first[small & (size > 0)], first[small & (size == 2)] + 1])
        first, size = first[~small], size[~small]
        source = torch.device("cpu") if generator is None else generator.device
        dice = torch.rand(2, len(first), dtype=torch.float64, device=source, generator=generator).to(device)
        one = (dice[0] * size).long().clamp_(max=size - 1)
        other = (one + 1 + (dice[1] * (size - 1)).long().clamp_(max=size - 2)) % size
        parts = min(PARTS, len(first))
        width = -(-len(first) // max(1, parts))
        padding = parts * width - len(first)
        pairs = torch.nn.functional.pad(torch.stack([first + one, first + other]), (0, padding))
        factors = torch.nn.functional.pad((size / 2).expand(2, -1), (0, padding))
        places = pairs.view(2, parts, width).transpose(0, 1).flatten()
        factors = factors.reshape(2, parts, width).transpose(0, 1).flatten()
        return cls(
            order[torch.cat([places, alone])],
            torch.cat([factors, torch.ones(len(alone), device=device)]),
            width,
            parts,
        )

    @property
    def ends(self) -> list[int]:
        """Where the rows that stand for some end, of what `chunks` numbers."""
        paired = 2 * self.parts * self.width
        standing = (self.factors[:paired].view(2 * self.parts, self.width) > 0).sum(-1)
        starts = torch.arange(2 * self.parts, device=standing.device) * self.width
        return [*(starts + standing).tolist(), len(self.slots)]

    @property
    def chunks(self) -> list[tuple[int, slice]]:
        """A few rows at a time: first and second rows of the parts by turns, numbered; last those that stand alone."""
        count, paired = len(self.slots), 2 * self.parts * self.width
        turns = [(start, start + self.width) for start in range(0, paired, max(1, self.width))]
        return [
            (number, slice(start, min(start + CHUNK_ROWS, stop)))
            for number, (first, stop) in enumerate([*turns, (paired, count)])
            for start in range(first, stop, CHUNK_ROWS)
        ]


def _edges(counts: Tensor, importance: Tensor | None, strata: int) -> Tensor:  # (L,), (L,) -> (strata + 1,)
    """Where to cut the rows so that every stratum has the same measure, to a row."""
    ends = counts.cumsum(0).double()
    total = ends[-1]
    density = torch.full_like(ends, 1.0) / total
    if importance is not None:
        total_importance = (importance * counts).sum()
        if total_importance > 0:
            density = ALIKE * density + (1 - ALIKE) * importance / total_importance
    measure = torch.cat([ends.new_zeros(1), (density * counts).cumsum(0)])
    targets = torch.arange(strata + 1, device=counts.device).double() * (measure[-1] / strata)
    place = torch.searchsorted(measure, targets, right=True).sub_(1).clamp_(0, len(counts) - 1)
    edges = ends[place] - counts[place] + (targets - measure[place]) / density[place]
    edges = torch.minimum(edges, ends[place]).round_().long()
    edges[-1] = ends[-1]
    return edges
