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
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.index.list_layout import MAX_SCORE_GAP
from softdb.index.policy import FIRST_QUERY_COST
from softdb.kernels.gather import GatherIndex
from softdb.kernels.hidden import propagate_nan, separate_nonfinite_values, zero_hidden_keys
from softdb.kernels.spec import ReadSpec, check_scores
from softdb.reading.result import Read, share_of, transform
from softdb.reading.sample import CHUNK_ROWS, PARTS, Sample
from softdb.reading.tables import Tables

__all__ = ["TailCosts", "add_tail", "is_worth_trying", "samples_for"]


Rows = Callable[[slice], tuple[Tensor, Tensor]]


# Rows are counted as found for certain as long as it is less likely than this that one of them is not; how far values
# lie from the answer is told by so many of the next.
SURELY, TOLD_BY, LEAST_RECALL = 0.05, 16, 0.01


TINY = 1e-300


# No error is told to be less than so many times the precision of a number: an exact read's is not, either.
ROUNDING = 64


# This part of a batch, the lower, tells what error is usual.
USUAL = 0.95


# ``error`` is so many standard deviations that nine of ten errors are below it, and so many more for values of width 1,
# fewer by the root of the width: the norm of what is wide varies less.
DEVIATIONS, DEVIATIONS_OF_ONE = 1.4, 0.4


@dataclass(frozen=True)
class TailCosts:
    """What sampled reads cost, in products of a query with one key and its value in an exact read.

    Attributes:
        sample_row: A query with a sampled row.
        sample_queries: A sample costs as if there were this many more queries, since its rows are gathered from all
            over memory.
        candidate: A query with a candidate.
        sample: A sample, whatever its size.
        trial_share: A first sample is worth trying where it and the candidates cost at most this fraction of an exact
            read.
    """

    sample_row: float = 1.7
    sample_queries: float = 130
    candidate: float = 150
    sample: float = 5e6
    trial_share: float = 1 / 4

    def of_sample(self, samples: float, queries: int) -> float:
        """Return the cost of a sample of so many rows that so many queries read."""
        return self.sample + self.sample_row * samples * (queries + self.sample_queries) if queries else 0.0


def add_tail(read: Read, query: Tensor, tables: Tables, spec: ReadSpec, sample: Sample, recall: float = 1.0) -> Read:
    """A softmax read of candidates and, by a sample, of all other rows.

    ``error`` is about 1.5 times the standard deviation of the numerator's error for this normaliser, in parts of the
    norm of the answer. For gradients, the sample's scores and weights are held, (M, m).

    Args:
        read: Of the candidates; its ``ids`` are slots.
        query: Prepared, (M, w).
        tables: One group.
        spec: How queries meet rows; its selection says which each may see.
        sample: Of all rows that some query may see.
        recall: The share of the best rows that the candidates are expected to hold.
    """
    selection, count = spec.selection, len(query)
    hides = not selection.is_shared  # of the sample, what no query may see is left out already
    if hides and torch.is_grad_enabled() and (query.requires_grad or tables.keys.requires_grad):
        tables = replace(tables, keys=zero_hidden_keys(tables.keys, spec, 1, count))
    estimated = _with_tail(read, query, tables, spec, sample, recall)
    if hides and not is_finite(estimated.values):
        mended = separate_nonfinite_values(tables.values, selection.among(sample.slots.unique()), 1, count)
        if mended is not None:
            values, spoilt = mended
            estimated = _with_tail(read, query, replace(tables, values=values), spec, sample, recall)
            error = cast(Tensor, estimated.error).masked_fill(spoilt.any(-1), torch.inf)
            return replace(estimated, values=propagate_nan(estimated.values, spoilt), error=error)
    return estimated


def _with_tail(read: Read, query: Tensor, tables: Tables, spec: ReadSpec, sample: Sample, recall: float) -> Read:
    """`add_tail`, where no row that is hidden holds NaN or infinity."""
    rows = _rows(sample, tables, spec, query.requires_grad)
    nothing = read.lse == -torch.inf  # where there are no candidates, there are no rows
    shift = read.lse.detach().masked_fill(nothing, 0.0)
    found, height = [], max(1, spec.tiling.tile_elements // CHUNK_ROWS)
    for start in range(0, max(1, len(query)), height):
        part = slice(start, min(start + height, len(query)))
        hidden = _Hidden.of(sample, spec, cast(Tensor, read.ids), part)
        summed = _sums(query[part], rows, shift[part], sample, hidden, tables.values.shape[1])
        if not is_finite(summed.total):  # a row that the index missed is far better than all that it found
            shift[part] += _excess(query[part], rows, shift[part], hidden)
            summed = _sums(query[part], rows, shift[part], sample, hidden, tables.values.shape[1])
        found.append(summed)
    summed = _Sums(*map(torch.cat, zip(*found, strict=True)))
    own = (read.lse - shift).exp()
    total = (own + summed.total).masked_fill(nothing, 1.0)
    answer = (own.unsqueeze(-1) * read.values + summed.values) / total.unsqueeze(-1)
    lse = (total.log() + shift).masked_fill(nothing, -torch.inf)
    check_scores(lse, empty=True)
    weights = cast(Tensor, read.weights) * (own / total).unsqueeze(-1)
    estimated = replace(read, values=answer, weights=weights, lse=lse, mass=share_of(weights))
    error = _error(summed, sample, transform(estimated, Tensor.detach), tables, total.detach(), recall)
    return replace(estimated, error=error.masked_fill(nothing, 0.0))


def _exact_cost(population: int, queries: int) -> float:
    return float(population * (queries + FIRST_QUERY_COST)) if queries else 0.0


def is_worth_trying(samples: int, candidates: int, queries: int, population: int, costs: TailCosts) -> bool:
    """Return whether candidates and a first sample cost little, compared with an exact read."""
    cost = costs.of_sample(samples, queries) + costs.candidate * candidates * queries
    return cost <= costs.trial_share * _exact_cost(population, queries)


def samples_for(needed: Tensor, population: int, costs: TailCosts) -> int:  # (b,)
    """How large a sample to draw next, of so many rows, where queries are known to need so many; 0 where none pays.

    Those that need more are left for another sample, or an exact read.
    """
    ordered, count = needed.sort().values, len(needed)
    best, least = 0, _exact_cost(population, count)
    for place in {count // 4, count // 2, 3 * count // 4, count - 1} if count else ():
        samples = float(ordered[place])
        rest = count - int(torch.searchsorted(ordered, ordered[place], right=True))
        later = min(_exact_cost(population, rest), costs.of_sample(float(ordered[-1]), rest))
        cost = costs.of_sample(samples, count - rest) + later
        if samples < population and cost < least:
            best, least = math.ceil(samples), cost
    return best


def _rows(sample: Sample, tables: Tables, spec: ReadSpec, queries_learn: bool) -> Rows:
    """A function that gives prepared keys, and values, of a chunk of the sample."""
    if torch.is_grad_enabled() and (queries_learn or tables.keys.requires_grad or tables.values.requires_grad):
        places = GatherIndex(sample.slots.unsqueeze(0))
        operand = spec.prepare_keys(tables.gather_keys(places, tables.keys.dtype).squeeze(0))
        values = tables.gather_values(places, spec.dtype).squeeze(0)
        return lambda chunk: (operand[chunk], values[chunk])
    tables = Tables(tables.keys.detach(), tables.values.detach())

    def gathered(chunk: slice) -> tuple[Tensor, Tensor]:  # in the cache, and in memory that is used again
        slots = sample.slots[chunk]
        return spec.prepare_keys(tables.keys.index_select(0, slots)), tables.values.index_select(0, slots).to(
            spec.dtype
        )

    return gathered


@dataclass(frozen=True, eq=False)
class _Hidden:
    """What of a sample does not count for some queries: candidates, and rows that they may not see.

    Attributes:
        chunks: The chunks of the sample, numbered, and for each, pairs (query numbers, columns).
        mask: Which may be seen, broadcastable to (b, m), or None for all.
        ends: Where the rows of each part end that stand for some, by number.
        dtype: Of the sums.
    """

    chunks: list[tuple[int, slice, Tensor, Tensor]]
    mask: Tensor | None
    ends: list[int]
    dtype: torch.dtype

    @classmethod
    def of(cls, sample: Sample, spec: ReadSpec, candidates: Tensor, part: slice) -> _Hidden:
        selection, numbers, chunks = spec.selection, candidates[part], sample.chunks
        if selection.excluded is not None:
            numbers = torch.cat([numbers, selection.excluded[part]], dim=-1)
        real = sample.factors > 0  # what only makes a part as wide is a copy of another row
        column_of = numbers.new_full((selection.size + 1,), -1, dtype=torch.int32)  # the last for padding, -1
        column_of[sample.slots[real]] = real.nonzero().squeeze(-1).int()
        column = column_of[numbers]
        query, place = (column >= 0).nonzero(as_tuple=True)
        column, order = column[query, place].long().sort()
        query = query[order]
        starts = column.new_tensor([chunk.start for _, chunk in chunks])
        ends = [*torch.searchsorted(column, starts).tolist(), len(column)]
        pairs = [
            (number, chunk, query[first:last], column[first:last] - chunk.start)
            for (number, chunk), (first, last) in zip(chunks, itertools.pairwise(ends), strict=True)
        ]
        mask = None if selection.rule is None else selection.rule(sample.slots)
        return cls(
            pairs, mask if mask is None or mask.dim() < 2 or len(mask) == 1 else mask[part], sample.ends, spec.dtype
        )

    def scores(self, query: Tensor, rows: Rows, shift: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """The scores of every chunk of the sample, (c, b), less the shift, -inf where hidden; and values, (c, dv)."""
        columns = query.T.contiguous()
        for number, chunk, queries, column in self.chunks:
            # What is close to underflow is slow to exponentiate and to multiply.
            operand, values = rows(chunk)
            scores = (operand @ columns).sub_(shift).clamp_(min=-MAX_SCORE_GAP)
            if len(queries):
                scores[column, queries] = -torch.inf
            if chunk.stop > self.ends[number]:
                scores[max(0, self.ends[number] - chunk.start) :] = -torch.inf
            if self.mask is not None:
                mask = self.mask[..., chunk] if self.mask.shape[-1] > 1 else self.mask
                scores.masked_fill_(~mask.T if mask.dim() > 1 else ~mask.unsqueeze(-1), -torch.inf)
            yield number, chunk, scores, values


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


def _sums(query: Tensor, rows: Rows, shift: Tensor, sample: Sample, hidden: _Hidden, width: int) -> _Sums:
    factors = sample.factors.to(hidden.dtype)
    blends = [factors.new_zeros(width, len(query))] * (2 * sample.parts + 1)
    totals = [factors.new_zeros(len(query))] * (2 * sample.parts + 1)
    for number, chunk, scores, values in hidden.scores(query, rows, shift):
        weights = scores.exp_().to(values.dtype)
        blends[number] = torch.addmm(blends[number], (values * factors[chunk, None]).T, weights)
        totals[number] = torch.addmv(totals[number], weights.T, factors[chunk])
    blend, total = torch.stack(blends, dim=1).permute(2, 1, 0), torch.stack(totals, dim=1)
    first, second = slice(0, 2 * sample.parts, 2), slice(1, 2 * sample.parts, 2)
    apart = [(sums[:, first] - sums[:, second]).detach() for sums in (blend, total)]
    return _Sums(blend.sum(1), total.sum(1), *apart)


@torch.no_grad()
def _excess(query: Tensor, rows: Rows, shift: Tensor, hidden: _Hidden) -> Tensor:  # (b, w), (b,) -> (b,)
    """By how much the largest score of the rows that count is above the shift."""
    above = [scores.amax(0) for _, _, scores, _ in hidden.scores(query, rows, shift)]
    return torch.stack(above).amax(0).clamp(min=0)


def _error(summed: _Sums, sample: Sample, read: Read, tables: Tables, total: Tensor, recall: float) -> Tensor:
    """How far answers may be off, in parts of the norm of the true ones; infinity where that may be 0."""
    if len(sample.factors) == 0 or float(sample.factors.amax()) <= 1:  # all rows stand for themselves
        return torch.zeros_like(total)
    size = torch.linalg.vector_norm(read.values.double(), dim=-1)
    variance = _variance(summed, sample, read.values, total, size)
    if recall < 1:
        variance = variance + _variance_of_recall(read, tables, recall, size)
    # The square of an estimate's norm is larger than that of the truth by the variance, on average.
    deviations = DEVIATIONS + DEVIATIONS_OF_ONE / math.sqrt(read.values.shape[-1])
    error = deviations * (variance / (1 - deviations * variance).clamp(min=0)).sqrt()
    least = ROUNDING * torch.finfo(total.dtype).eps
    return torch.where(error.isnan(), torch.inf, error).clamp(min=least).to(total.dtype)


def _variance(summed: _Sums, sample: Sample, answer: Tensor, total: Tensor, size: Tensor) -> Tensor:
    """That of the sum of f * w * (value - answer) over the sample, in parts of the normaliser and the size, (M,).

    First and second rows of a stratum have the same mean: what the variance of their sum is, is expected of the square
    of their difference, but for the factor 1 - 1 / f, since they are never the same row. Where few rows matter, it is
    a guess from few numbers, and made larger, as Student's t is wider than the normal distribution; and as most samples
    hold none of these rows and tell too little, a query is told no less than the batch on average, outliers left out.
    """
    apart = summed.values_apart - summed.total_apart.unsqueeze(-1) * answer.unsqueeze(1)
    factors = sample.factors[: 2 * sample.parts * sample.width].view(sample.parts, 2 * sample.width)
    different = 1 - 1 / torch.nn.functional.pad(factors.double(), (0, 1), value=1.0).amax(-1)
    each = (apart.double() / (total * size).view(-1, 1, 1)).square().sum(-1) * different
    squared = each.sum(-1)
    if len(squared) == 0:
        return squared
    few = (each / squared.clamp(min=TINY).unsqueeze(-1)).square().sum(-1)  # 1 / 8 if all are alike, 1 if it is one
    squared = squared * ((1 + few) / (1 + 1 / PARTS)).square()
    usual = squared.sqrt().nan_to_num(nan=0.0).sort().values[: math.ceil(USUAL * len(squared))].mean()
    return torch.maximum(squared, usual.square())


def _variance_of_recall(read: Read, tables: Tables, recall: float, size: Tensor) -> Tensor:  # -> (M,)
    """What it adds that each of the best rows is found with the probability ``recall``.

    A row that is missed is seldom in the sample, so that the sample's own variance seldom tells. The very best rows do
    not count: that any of them is missed is less likely than `SURELY` says.
    """
    recall = max(recall, LEAST_RECALL)
    sure = round(SURELY / (1 - recall))
    squares = cast(Tensor, read.weights)[:, sure:].double().square()
    some = cast(Tensor, read.ids)[:, sure : sure + TOLD_BY]
    values = tables.values.detach()[some.clamp(min=0)].to(read.values.dtype)
    apart = ((values - read.values.unsqueeze(1)).double() / size.view(-1, 1, 1)).square().sum(-1)
    spread = (squares[:, :TOLD_BY] * apart).sum(-1) / squares[:, :TOLD_BY].sum(-1).clamp(min=TINY)
    return (1 - recall) / recall * squares.sum(-1) * spread
