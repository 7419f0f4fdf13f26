"""Tail samples: sampled rows that represent the rows outside of the candidates.

The sample is stratified by the lists of the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.index.list_layout import ListLayout

__all__ = ["Sample"]


# All strata have the same measure. This fraction of the measure is uniform over rows; the rest follows the importance
# of the lists. So even if the importance is wrong, the variance is at most 1 / UNIFORM_FRACTION times that of a simple
# random sample (docs/approximation.md).
UNIFORM_FRACTION = 0.5


# Number of parts of a sample. The differences between the two rows of a stratum, summed over each part, estimate the
# variance.
VARIANCE_PARTS = 8


# Number of sampled rows that are scored at a time.
SAMPLE_CHUNK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Sample:
    """Sampled rows, and the number of rows that each of them represents.

    Two rows are drawn from every stratum, a first and a second one. The strata are split into parts. In each part, the
    difference between the first and the second rows estimates the variance.

    Attributes:
        slots: Slots of the sampled rows, (m,). Each part holds ``width`` first rows, then the ``width`` second rows of
            the same strata. After all parts follow the rows of strata with one or two rows, which are all taken.
        factors: Number of rows that each sampled row represents, (m,): half the size of its stratum, 1 for the rows
            after the parts, 0 for the padding that fills the last part.
        width: Number of strata in a part.
        parts: Number of parts.
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
        """Draw two rows from every stratum.

        Strata have equal numbers of rows, or with ``importance``, equal measure (docs/approximation.md).

        Args:
            selection: Rows that may be sampled.
            count: Number of rows to draw, rounded up to an even number. If there are no more than ``count`` rows, all
                are taken.
            device: Device of the sample.
            generator: Generator of the draw; None for torch's default generator.
            layout: Lists of the index; None for strata of consecutive slots.
            importance: Importance of a row of each list, (L,); None if all rows are equally important.
        """
        if layout is None or selection.visited is not None:
            order = selection.shared_slots.to(device)
            counts, importance = torch.tensor([len(order)], device=device), None
        else:
            order, counts = layout.restrict(selection)
        if count >= len(order):
            return cls(order, torch.ones(len(order), device=device), 0, 0)
        strata = max(1, (count + 1) // 2)
        edges = _cut_strata(counts, importance, strata)
        first, size = edges[:-1], edges.diff()
        small = size <= 2
        singles = torch.cat([first[small & (size > 0)], first[small & (size == 2)] + 1])
        first, size = first[~small], size[~small]
        source = torch.device("cpu") if generator is None else generator.device
        uniform = torch.rand(2, len(first), dtype=torch.float64, device=source, generator=generator).to(device)
        first_offset = (uniform[0] * size).long().clamp_(max=size - 1)
        second_offset = (first_offset + 1 + (uniform[1] * (size - 1)).long().clamp_(max=size - 2)) % size
        parts = min(VARIANCE_PARTS, len(first))
        width = -(-len(first) // max(1, parts))
        padding = parts * width - len(first)
        pairs = torch.nn.functional.pad(torch.stack([first + first_offset, first + second_offset]), (0, padding))
        factors = torch.nn.functional.pad((size / 2).expand(2, -1), (0, padding))
        places = pairs.view(2, parts, width).transpose(0, 1).flatten()
        factors = factors.reshape(2, parts, width).transpose(0, 1).flatten()
        return cls(
            order[torch.cat([places, singles])],
            torch.cat([factors, torch.ones(len(singles), device=device)]),
            width,
            parts,
        )

    @property
    def ends(self) -> list[int]:
        """End of the rows that are not padding, for each number of `chunks`."""
        paired = 2 * self.parts * self.width
        drawn = (self.factors[:paired].view(2 * self.parts, self.width) > 0).sum(-1)
        starts = torch.arange(2 * self.parts, device=drawn.device) * self.width
        return [*(starts + drawn).tolist(), len(self.slots)]

    @property
    def chunks(self) -> list[tuple[int, slice]]:
        """Slices of at most `SAMPLE_CHUNK_ROWS` rows, each with a number.

        Slices with number 2 p hold first rows of part p, slices with number 2 p + 1 its second rows. Slices with the
        last number hold the rows after the parts.
        """
        count, paired = len(self.slots), 2 * self.parts * self.width
        halves = [(start, start + self.width) for start in range(0, paired, max(1, self.width))]
        return [
            (number, slice(start, min(start + SAMPLE_CHUNK_ROWS, stop)))
            for number, (first, stop) in enumerate([*halves, (paired, count)])
            for start in range(first, stop, SAMPLE_CHUNK_ROWS)
        ]


def _cut_strata(counts: Tensor, importance: Tensor | None, strata: int) -> Tensor:  # (L,), (L,) -> (strata + 1,)
    """Compute the boundaries of strata of equal measure, up to one row.

    Returns:
        Positions in the order of the lists, (strata + 1,).
    """
    ends = counts.cumsum(0).double()
    total = ends[-1]
    density = torch.full_like(ends, 1.0) / total
    if importance is not None:
        total_importance = (importance * counts).sum()
        if total_importance > 0:
            density = UNIFORM_FRACTION * density + (1 - UNIFORM_FRACTION) * importance / total_importance
    measure = torch.cat([ends.new_zeros(1), (density * counts).cumsum(0)])
    targets = torch.arange(strata + 1, device=counts.device).double() * (measure[-1] / strata)
    place = torch.searchsorted(measure, targets, right=True).sub_(1).clamp_(0, len(counts) - 1)
    edges = ends[place] - counts[place] + (targets - measure[place]) / density[place]
    edges = torch.minimum(edges, ends[place]).round_().long()
    edges[-1] = ends[-1]
    return edges
