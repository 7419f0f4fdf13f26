"""What a top-k read leaves out, estimated by a sample of the rows.

With S a query's candidates, w = exp(score), and a sample T of all rows in which row i stands for f_i rows::

    numerator  = sum of w * value over S + sum of f * w * value over T without S
    normaliser = sum of w over S         + sum of f * w over T without S

A row is in T with probability 1 / f, so both are unbiased whatever the candidates are (Horvitz and Thompson 1952, doi
10.1080/01621459.1952.10483446); the answer, their ratio, is consistent. The sample is stratified: the rows, in the
order of the index's lists, are cut into strata, and two rows of each are drawn. So the sample follows the clusters,
strata are smaller where the lists promise weight, and the two rows tell the variance. docs/approximation.md derives it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from softdb.blockwise import TILE_ELEMENTS, Places, Scan, check_scores
from softdb.errors import is_finite
from softdb.filters import Selection
from softdb.functional import Read, Tables, share_of

__all__ = ["Outline", "Sample", "add_tail", "promise_of"]

# The part of a sample that is drawn as if all rows were alike: where the lists promise wrongly, the variance is no more
# than this many times that of such a sample.
ALIKE = 0.5
# Into how many parts a sample is split to tell its variance.
PARTS = 8
# So many rows that stand for themselves are scored at a time.
CHUNK_ROWS = 4096
# Rows with a score so far below the best candidates' are taken to score no worse.
FURTHEST = 75.0
# ``error`` is so many standard deviations.
DEVIATIONS = 2.0


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


def promise_of(outline: Outline, query: Tensor, scan: Scan, read: Read) -> Tensor:  # (M, w) -> (L,)
    """The weight that a row of each list may have beside the candidates, root mean square over the queries."""
    operand = scan.operand(outline.means)
    twice = 2 * query.detach()  # squares of weights are exponentials of twice the scores
    most = 2 * cast(Tensor, read.scores).detach()[:, -1:].to(query.dtype)  # what is better should be a candidate
    total = 2 * read.lse.detach().unsqueeze(-1).to(query.dtype)
    squares = operand.new_zeros(len(operand))
    height = max(1, TILE_ELEMENTS // max(1, len(operand)))
    for start in range(0, len(query), height):
        part = slice(start, start + height)
        doubled = (twice[part] @ operand.T).clamp_(total[part] - FURTHEST, most[part]).sub_(total[part])
        squares += doubled.exp_().sum(0)
    return squares.double().nan_to_num_(nan=0.0, posinf=0.0).sqrt_()


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
        outline: Outline | None = None,
        promise: Tensor | None = None,
    ) -> Sample:
        """Two rows of every stratum, ``count`` in all, rounded up to an even number; all rows if there are no more.

        Strata hold as many rows as each other, or with a ``promise`` of weight, as much of that.
        """
        if outline is None or selection.visit is not None:
            order = selection.shared_slots.to(device)
            counts, promise = torch.tensor([len(order)], device=device), None
        else:
            order, counts = outline.among(selection)
        if count >= len(order):
            return cls(order, torch.ones(len(order), device=device), 0, 0)
        strata = max(1, (count + 1) // 2)
        edges = _edges(counts, promise, strata)
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
    def chunks(self) -> list[slice]:
        """The parts' first and second rows, by turns, and then the rows that stand for themselves."""
        paired = 2 * self.parts * self.width
        chunks = [slice(start, start + self.width) for start in range(0, paired, max(1, self.width))]
        alone = range(paired, len(self.slots), CHUNK_ROWS)
        return chunks + [slice(start, min(start + CHUNK_ROWS, len(self.slots))) for start in alone]


def _edges(counts: Tensor, promise: Tensor | None, strata: int) -> Tensor:  # (L,), (L,) -> (strata + 1,)
    """Where to cut the rows so that every stratum has the same measure, to a row."""
    ends = counts.cumsum(0).double()
    total = ends[-1]
    density = torch.full_like(ends, 1.0) / total
    if promise is not None:
        promised = (promise * counts).sum()
        if promised > 0:
            density = ALIKE * density + (1 - ALIKE) * promise / promised
    measure = torch.cat([ends.new_zeros(1), (density * counts).cumsum(0)])
    targets = torch.arange(strata + 1, device=counts.device).double() * (measure[-1] / strata)
    place = torch.searchsorted(measure, targets, right=True).sub_(1).clamp_(0, len(counts) - 1)
    edges = ends[place] - counts[place] + (targets - measure[place]) / density[place]
    edges = torch.minimum(edges, ends[place]).round_().long()
    edges[-1] = ends[-1]
    return edges


def add_tail(read: Read, query: Tensor, tables: Tables, scan: Scan, sample: Sample) -> Read:
    """A softmax read of candidates and, by a sample, of all other rows.

    ``error`` is twice the standard deviation of the numerator's error for this normaliser, divided by the norm of the
    answer. Of gradients, the sample's scores and weights are held, (M, m).

    Args:
        read: Of the candidates; its ``ids`` are slots.
        query: Prepared, (M, w).
        tables: One group.
        scan: How queries meet rows; its selection says which each may see.
        sample: Of all rows that some query may see.
    """
    places = Places(sample.slots.unsqueeze(0))
    keys = tables.gather_keys(places, tables.keys.dtype).squeeze(0)
    values = tables.gather_values(places, scan.dtype).squeeze(0)
    operand = scan.operand(keys)
    nothing = read.lse == -torch.inf  # where there are no candidates, there are no rows
    shift = read.lse.detach().masked_fill(nothing, 0.0)
    chunks = sample.chunks
    height = max(1, TILE_ELEMENTS // max([1, *(chunk.stop - chunk.start for chunk in chunks)]))
    found = []
    for start in range(0, max(1, len(query)), height):
        part = slice(start, min(start + height, len(query)))
        hidden = _Hidden.of(sample, chunks, scan.selection, cast(Tensor, read.ids), part)
        summed = _sums(query[part], operand, values, shift[part], sample, hidden)
        if not is_finite(summed.total):  # a row that the index missed is far better than all that it found
            shift[part] = torch.maximum(shift[part], _largest(query[part], operand, hidden))
            summed = _sums(query[part], operand, values, shift[part], sample, hidden)
        found.append(summed)
    summed = _Sums(*map(torch.cat, zip(*found, strict=True)))
    own = (read.lse - shift).exp()
    total = (own + summed.total).masked_fill(nothing, 1.0)
    answer = (own.unsqueeze(-1) * read.values + summed.values) / total.unsqueeze(-1)
    lse = (total.log() + shift).masked_fill(nothing, -torch.inf)
    check_scores(lse, empty=True)
    weights = cast(Tensor, read.weights) * (own / total).unsqueeze(-1)
    error = _error(summed, answer.detach(), total.detach())
    return replace(read, values=answer, weights=weights, lse=lse, mass=share_of(weights), error=error)


@dataclass(frozen=True, eq=False)
class _Hidden:
    """What of a sample does not count for some queries: candidates, and rows that they may not see.

    Attributes:
        chunks: The chunks of the sample, and for each, pairs (query numbers, columns).
        mask: Which may be seen, broadcastable to (b, m), or None for all.
    """

    chunks: list[tuple[slice, Tensor, Tensor]]
    mask: Tensor | None

    @classmethod
    def of(cls, sample: Sample, chunks: list[slice], selection: Selection, candidates: Tensor, part: slice) -> _Hidden:
        numbers = candidates[part]
        if selection.excluded is not None:
            numbers = torch.cat([numbers, selection.excluded[part]], dim=-1)
        real = sample.factors > 0  # what only makes a part as wide is a copy of another row
        column_of = numbers.new_full((selection.size + 1,), -1, dtype=torch.int32)  # the last for padding, -1
        column_of[sample.slots[real]] = real.nonzero().squeeze(-1).int()
        column = column_of[numbers]
        query, place = (column >= 0).nonzero(as_tuple=True)
        column, order = column[query, place].long().sort()
        query = query[order]
        starts = column.new_tensor([chunk.start for chunk in chunks])
        ends = [*torch.searchsorted(column, starts).tolist(), len(column)]
        pairs = [
            (chunk, query[first:last], column[first:last] - chunk.start)
            for chunk, (first, last) in zip(chunks, itertools.pairwise(ends), strict=True)
        ]
        mask = None if selection.rule is None else selection.rule(sample.slots)
        return cls(pairs, mask if mask is None or mask.dim() < 2 or len(mask) == 1 else mask[part])

    def scores(self, query: Tensor, operand: Tensor, shift: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The scores with every chunk of the sample less the shift, -inf where hidden."""
        for chunk, number, column in self.chunks:
            # What is close to underflow is slow to exponentiate and to multiply.
            scores = (query @ operand[chunk].T).sub_(shift.unsqueeze(-1)).clamp_(min=-FURTHEST)
            if len(number):
                scores[number, column] = -torch.inf
            if self.mask is not None:
                mask = self.mask[..., chunk] if self.mask.shape[-1] > 1 else self.mask
                scores.masked_fill_(~mask, -torch.inf)
            yield chunk, scores


class _Sums(NamedTuple):
    """Sums over a sample, with w = exp(score - shift), for b queries.

    Attributes:
        values: The sums of f * w * value, (b, dv).
        total: The sums of f * w, (b,).
        values_apart, total_apart: By how much the two are more for first rows of strata than for second ones, of each
            part of the sample, (b, parts, dv) and (b, parts); without gradient.
    """

    values: Tensor
    total: Tensor
    values_apart: Tensor
    total_apart: Tensor


def _sums(query: Tensor, operand: Tensor, values: Tensor, shift: Tensor, sample: Sample, hidden: _Hidden) -> _Sums:
    factors = sample.factors.to(values.dtype)
    blends, totals = [], []
    for chunk, scores in hidden.scores(query, operand, shift):
        weights = scores.exp_().to(values.dtype)
        weights = weights * factors[chunk] if weights.requires_grad else weights.mul_(factors[chunk])
        blends.append(weights @ values[chunk])
        totals.append(weights.sum(-1))
    blend = torch.stack([values.new_zeros(len(query), values.shape[1]), *blends], dim=1)
    total = torch.stack([values.new_zeros(len(query)), *totals], dim=1)
    first, second = slice(1, 2 * sample.parts, 2), slice(2, 2 * sample.parts + 1, 2)
    apart = [(sums[:, first] - sums[:, second]).detach() for sums in (blend, total)]
    return _Sums(blend.sum(1), total.sum(1), *apart)


@torch.no_grad()
def _largest(query: Tensor, operand: Tensor, hidden: _Hidden) -> Tensor:  # (b, w), (m, w) -> (b,)
    """The largest score of the rows that count."""
    nothing = query.new_zeros(len(query))
    return torch.stack([scores.amax(-1) for _, scores in hidden.scores(query, operand, nothing)]).amax(0)


def _error(summed: _Sums, answer: Tensor, total: Tensor) -> Tensor:  # (M, dv), (M,) -> (M,)
    """The relative error of ``answer``: twice the standard deviation of the sum of f * w * (value - answer).

    First and second rows of a stratum have the same mean: what the variance of their sum is, is expected of the square
    of their difference.
    """
    apart = summed.values_apart - summed.total_apart.unsqueeze(-1) * answer.unsqueeze(1)
    deviation = apart.square().sum((1, 2)).sqrt() / total
    size = torch.linalg.vector_norm(answer, dim=-1)
    return torch.where(deviation > 0, DEVIATIONS * deviation / size, 0.0)
