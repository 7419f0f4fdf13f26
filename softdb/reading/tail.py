"""Tail samples: estimates of the rows outside of the candidates of a top-k read.

With S the candidates of a query, w = exp(score), and a sample T of all rows in which row i represents f_i rows::

    numerator   = sum of w * value over S + sum of f * w * value over T without S
    denominator = sum of w over S         + sum of f * w over T without S

A row is in T with probability 1 / f, so both sums are unbiased for any candidates (Horvitz and Thompson 1952, doi
10.1080/01621459.1952.10483446). Their ratio, the result, is a consistent estimate. The sample is stratified: the rows
are cut into strata in the order of the index's lists, and two rows are drawn from each stratum. This has three effects.
Rows of one stratum are similar. Lists that are important for the queries get smaller strata, so more of their rows are
sampled. The differences between the two rows of each stratum estimate the variance. docs/approximation.md has the
derivation.
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
from softdb.reading.result import Read, compute_mass, transform
from softdb.reading.sample import SAMPLE_CHUNK_ROWS, VARIANCE_PARTS, Sample
from softdb.reading.tables import Tables

__all__ = ["TailCosts", "add_tail", "choose_sample_size", "estimate_exact_cost", "is_worth_trying"]


RowSource = Callable[[slice], tuple[Tensor, Tensor]]


# The best rows count as found if the probability that one of them is missed is at most this.
MISS_PROBABILITY = 0.05


# Number of candidates, after the best rows that count as found, which estimate how far values are from the result.
SPREAD_CANDIDATES = 16


# Lower limit of the recall in the estimate of the error.
MIN_RECALL = 0.01


MIN_DIVISOR = 1e-300


# Lower limit of ``error``, in units of the machine epsilon of the dtype: the rounding error of an exact read.
MIN_ERROR_EPS = 64


# The deviation of a query is at least the trimmed mean of the batch: the mean over this fraction of the queries, those
# with the smallest deviations.
TRIMMED_FRACTION = 0.95


# Number of standard deviations in ``error``: the first constant plus the second divided by the square root of the width
# of the values, because the norm of a wide vector varies less. Chosen so that nine of ten true errors are at most
# ``error`` (docs/approximation.md).
DEVIATIONS, DEVIATIONS_FOR_WIDTH_ONE = 1.4, 0.4


@dataclass(frozen=True)
class TailCosts:
    """Costs of sampled reads.

    The unit is the product of a query with one key and one value in an exact read.

    Attributes:
        sample_row: Cost of one sampled row for one query.
        sample_queries: Cost of gathering one sampled row, in units of ``sample_row``: the gather costs as much as this
            number of additional queries.
        candidate: Cost of one candidate for one query.
        sample: Fixed cost of a sample.
        max_trial_fraction: A first sample is tried only if its cost plus that of the candidates is at most this
            fraction of the cost of an exact read.
        exact_search: Cost of one row of an exact search for candidates: only the product with its key.
    """

    sample_row: float = 1.7
    sample_queries: float = 130
    candidate: float = 150
    sample: float = 5e6
    max_trial_fraction: float = 1 / 4
    exact_search: float = 0.6

    def estimate_sample_cost(self, samples: float, queries: int) -> float:
        """Estimate the cost of a sample for a number of queries."""
        return self.sample + self.sample_row * samples * (queries + self.sample_queries) if queries else 0.0

    def estimate_candidates_cost(self, k: int, queries: int, searched: int) -> float:
        """Estimate the cost of k candidates from an exact search of ``searched`` rows."""
        return queries * (self.candidate * k + self.exact_search * searched)


def add_tail(read: Read, query: Tensor, tables: Tables, spec: ReadSpec, sample: Sample, recall: float = 1.0) -> Read:
    """Add a sample of all other rows to a softmax read of candidates.

    ``error`` is `DEVIATIONS` plus up to `DEVIATIONS_FOR_WIDTH_ONE` standard deviations of the result, relative to its
    norm (docs/approximation.md). If gradients are needed, the scores and weights of the sample, (M, m), are kept for
    backward.

    Args:
        read: The read of the candidates; its ``ids`` are slots.
        query: Prepared queries, (M, w).
        tables: Keys and values of one group.
        spec: Metric, filters and dtype.
        sample: A sample of the rows that some query may see.
        recall: Expected fraction of the best rows among the candidates.
    """
    selection, count = spec.selection, len(query)
    has_hidden = not selection.is_shared  # the sample has no rows that are hidden from all queries
    if has_hidden and torch.is_grad_enabled() and (query.requires_grad or tables.keys.requires_grad):
        tables = replace(tables, keys=zero_hidden_keys(tables.keys, spec, 1, count))
    estimated = _add_finite_tail(read, query, tables, spec, sample, recall)
    if has_hidden and not is_finite(estimated.values):
        repaired = separate_nonfinite_values(tables.values, selection.restrict_to(sample.slots.unique()), 1, count)
        if repaired is not None:
            values, invalid = repaired
            estimated = _add_finite_tail(read, query, replace(tables, values=values), spec, sample, recall)
            error = cast(Tensor, estimated.error).masked_fill(invalid.any(-1), torch.inf)
            return replace(estimated, values=propagate_nan(estimated.values, invalid), error=error)
    return estimated


def _add_finite_tail(read: Read, query: Tensor, tables: Tables, spec: ReadSpec, sample: Sample, recall: float) -> Read:
    """Run `add_tail` where no hidden row holds NaN or infinity."""
    rows = _make_row_source(sample, tables, spec, query.requires_grad)
    is_empty = read.lse == -torch.inf  # without candidates there are no visible rows
    shift = read.lse.detach().masked_fill(is_empty, 0.0)
    batch_sums, chunk_queries = [], max(1, spec.tiling.tile_elements // SAMPLE_CHUNK_ROWS)
    for start in range(0, max(1, len(query)), chunk_queries):
        part = slice(start, min(start + chunk_queries, len(query)))
        hidden = _SampleMask.build(sample, spec, cast(Tensor, read.ids), part)
        summed = _sum_sample(query[part], rows, shift[part], sample, hidden, tables.values.shape[1])
        if not is_finite(summed.total):  # overflow: the index missed a row that scores far higher than all candidates
            shift[part] += _find_excess_score(query[part], rows, shift[part], hidden)
            summed = _sum_sample(query[part], rows, shift[part], sample, hidden, tables.values.shape[1])
        batch_sums.append(summed)
    summed = _SampleSums(*map(torch.cat, zip(*batch_sums, strict=True)))
    own = (read.lse - shift).exp()
    total = (own + summed.total).masked_fill(is_empty, 1.0)
    answer = (own.unsqueeze(-1) * read.values + summed.values) / total.unsqueeze(-1)
    lse = (total.log() + shift).masked_fill(is_empty, -torch.inf)
    check_scores(lse, spec.pending_checks, empty=True)
    weights = cast(Tensor, read.weights) * (own / total).unsqueeze(-1)
    estimated = replace(read, values=answer, weights=weights, lse=lse, mass=compute_mass(weights))
    error = _bound_error(summed, sample, transform(estimated, Tensor.detach), tables, total.detach(), recall)
    return replace(estimated, error=error.masked_fill(is_empty, 0.0))


def estimate_exact_cost(population: int, queries: int) -> float:
    """Estimate the cost of an exact read."""
    return float(population * (queries + FIRST_QUERY_COST)) if queries else 0.0


def is_worth_trying(samples: int, candidates: int, queries: int, population: int, costs: TailCosts) -> bool:
    """Return whether a first sample is cheap compared with an exact read."""
    cost = costs.estimate_sample_cost(samples, queries) + costs.candidate * candidates * queries
    return cost <= costs.max_trial_fraction * estimate_exact_cost(population, queries)


def choose_sample_size(needed: Tensor, population: int, costs: TailCosts) -> int:  # (b,)
    """Choose the number of rows of the next sample.

    Queries that need more rows are left for a later sample or an exact read.

    Args:
        needed: Number of rows that each query needs, (b,).
        population: Number of rows to sample from.
        costs: Costs of samples.

    Returns:
        The number of rows; 0 if an exact read is cheaper.
    """
    ordered, count = needed.sort().values, len(needed)
    best, lowest_cost = 0, estimate_exact_cost(population, count)
    for place in {count // 4, count // 2, 3 * count // 4, count - 1} if count else ():
        samples = float(ordered[place])
        rest = count - int(torch.searchsorted(ordered, ordered[place], right=True))
        later_cost = min(estimate_exact_cost(population, rest), costs.estimate_sample_cost(float(ordered[-1]), rest))
        cost = costs.estimate_sample_cost(samples, count - rest) + later_cost
        if samples < population and cost < lowest_cost:
            best, lowest_cost = math.ceil(samples), cost
    return best


def _make_row_source(sample: Sample, tables: Tables, spec: ReadSpec, query_needs_grad: bool) -> RowSource:
    """Make a function that returns prepared keys and values of a chunk."""
    if torch.is_grad_enabled() and (query_needs_grad or tables.keys.requires_grad or tables.values.requires_grad):
        places = GatherIndex(sample.slots.unsqueeze(0))
        operand = spec.prepare_keys(tables.gather_keys(places, tables.keys.dtype).squeeze(0))
        values = tables.gather_values(places, spec.dtype).squeeze(0)
        return lambda chunk: (operand[chunk], values[chunk])
    tables = Tables(tables.keys.detach(), tables.values.detach())

    def gather(chunk: slice) -> tuple[Tensor, Tensor]:  # a small gather stays in the cache
        slots = sample.slots[chunk]
        return spec.prepare_keys(tables.keys.index_select(0, slots)), tables.values.index_select(0, slots).to(
            spec.dtype
        )

    return gather


@dataclass(frozen=True, eq=False)
class _SampleMask:
    """Rows of a sample that are hidden from some queries.

    A row is hidden from a query if it is a candidate, whose weight is in the sum already, or if a filter hides it.

    Attributes:
        chunks: For each chunk of the sample: its number, its slice, and its hidden pairs as query numbers and columns.
        mask: True where a query may see a row, broadcastable to (b, m); None where all queries see all rows.
        ends: End of the rows that are not padding, for each chunk number.
        dtype: dtype of the sums.
    """

    chunks: list[tuple[int, slice, Tensor, Tensor]]
    mask: Tensor | None
    ends: list[int]
    dtype: torch.dtype

    @classmethod
    def build(cls, sample: Sample, spec: ReadSpec, candidates: Tensor, part: slice) -> _SampleMask:
        """Build the mask of a sample for the queries in ``part``."""
        selection, numbers, chunks = spec.selection, candidates[part], sample.chunks
        if selection.excluded is not None:
            numbers = torch.cat([numbers, selection.excluded[part]], dim=-1)
        real = sample.factors > 0  # padding repeats another row
        column_of = numbers.new_full((selection.size + 1,), -1, dtype=torch.int32)  # the last entry is for padding, -1
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

    def scores(self, query: Tensor, rows: RowSource, shift: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Yield the scores and values of each chunk of the sample.

        Yields:
            Chunk number, slice, scores less ``shift`` (c, b), -inf where hidden, and values (c, dv).
        """
        columns = query.T.contiguous()
        for number, chunk, queries, column in self.chunks:
            operand, values = rows(chunk)
            # Clamp, because exponentials and products of numbers close to underflow are slow.
            scores = (operand @ columns).sub_(shift).clamp_(min=-MAX_SCORE_GAP)
            if len(queries):
                scores[column, queries] = -torch.inf
            if chunk.stop > self.ends[number]:
                scores[max(0, self.ends[number] - chunk.start) :] = -torch.inf
            if self.mask is not None:
                mask = self.mask[..., chunk] if self.mask.shape[-1] > 1 else self.mask
                scores.masked_fill_(~mask.T if mask.dim() > 1 else ~mask.unsqueeze(-1), -torch.inf)
            yield number, chunk, scores, values


class _SampleSums(NamedTuple):
    """Sums over a sample, with w = exp(score - shift), for b queries.

    Attributes:
        values: Sums of f * w * value, (b, dv).
        total: Sums of f * w, (b,).
        value_differences: Sum of f * w * value over first rows minus that over second rows, for each part of the
            sample, (b, parts, dv), without gradient.
        total_differences: The same for f * w, (b, parts).
    """

    values: Tensor
    total: Tensor
    value_differences: Tensor
    total_differences: Tensor


def _sum_sample(
    query: Tensor, rows: RowSource, shift: Tensor, sample: Sample, hidden: _SampleMask, width: int
) -> _SampleSums:
    factors = sample.factors.to(hidden.dtype)
    blends = [factors.new_zeros(width, len(query))] * (2 * sample.parts + 1)
    totals = [factors.new_zeros(len(query))] * (2 * sample.parts + 1)
    for number, chunk, scores, values in hidden.scores(query, rows, shift):
        weights = scores.exp_().to(values.dtype)
        blends[number] = torch.addmm(blends[number], (values * factors[chunk, None]).T, weights)
        totals[number] = torch.addmv(totals[number], weights.T, factors[chunk])
    blend, total = torch.stack(blends, dim=1).permute(2, 1, 0), torch.stack(totals, dim=1)
    first, second = slice(0, 2 * sample.parts, 2), slice(1, 2 * sample.parts, 2)
    differences = [(sums[:, first] - sums[:, second]).detach() for sums in (blend, total)]
    return _SampleSums(blend.sum(1), total.sum(1), *differences)


@torch.no_grad()
def _find_excess_score(
    query: Tensor, rows: RowSource, shift: Tensor, hidden: _SampleMask
) -> Tensor:  # (b, w), (b,) -> (b,)
    """Compute how far the largest visible score is above the shift."""
    above = [scores.amax(0) for _, _, scores, _ in hidden.scores(query, rows, shift)]
    return torch.stack(above).amax(0).clamp(min=0)


def _bound_error(
    summed: _SampleSums, sample: Sample, read: Read, tables: Tables, total: Tensor, recall: float
) -> Tensor:
    """Compute an upper bound of the relative error that holds in nine of ten cases.

    Infinity where the exact values may be 0.
    """
    if len(sample.factors) == 0 or float(sample.factors.amax()) <= 1:  # the sample holds all rows
        return torch.zeros_like(total)
    if read.values.shape[-1] == 0:
        return torch.zeros_like(total)
    size = torch.linalg.vector_norm(read.values.double(), dim=-1)
    variance = _estimate_variance(summed, sample, read.values, total, size)
    if recall < 1:
        variance = variance + _estimate_recall_variance(read, tables, recall, size)
    # On average, the squared norm of the estimate exceeds that of the exact values by the variance.
    deviations = DEVIATIONS + DEVIATIONS_FOR_WIDTH_ONE / math.sqrt(read.values.shape[-1])
    error = deviations * (variance / (1 - deviations * variance).clamp(min=0)).sqrt()
    min_error = MIN_ERROR_EPS * torch.finfo(total.dtype).eps
    return torch.where(error.isnan(), torch.inf, error).clamp(min=min_error).to(total.dtype)


def _estimate_variance(summed: _SampleSums, sample: Sample, answer: Tensor, total: Tensor, size: Tensor) -> Tensor:
    """Estimate the variance of the sum of f * w * (value - result).

    The sum is divided by the denominator and by the norm of the result. Both rows of a stratum have the same mean, so
    the squared difference of their sums estimates the variance. The factor 1 - 1 / f corrects for the fact that the two
    rows are never the same. If few parts make up most of the variance, the estimate has few degrees of freedom and is
    increased, as Student's t is wider than the normal distribution. A sample that misses the few rows with most of the
    weight underestimates the variance, so each query gets at least the trimmed mean of the batch.
    """
    differences = summed.value_differences - summed.total_differences.unsqueeze(-1) * answer.unsqueeze(1)
    factors = sample.factors[: 2 * sample.parts * sample.width].view(sample.parts, 2 * sample.width)
    corrections = 1 - 1 / torch.nn.functional.pad(factors.double(), (0, 1), value=1.0).amax(-1)
    each = (differences.double() / (total * size).view(-1, 1, 1)).square().sum(-1) * corrections
    squared = each.sum(-1)
    if len(squared) == 0:
        return squared
    # From 1 / VARIANCE_PARTS, where all parts are equal, to 1, where one part has all of the variance.
    concentration = (each / squared.clamp(min=MIN_DIVISOR).unsqueeze(-1)).square().sum(-1)
    squared = squared * ((1 + concentration) / (1 + 1 / VARIANCE_PARTS)).square()
    typical = squared.sqrt().nan_to_num(nan=0.0).sort().values[: math.ceil(TRIMMED_FRACTION * len(squared))].mean()
    return torch.maximum(squared, typical.square())


def _estimate_recall_variance(read: Read, tables: Tables, recall: float, size: Tensor) -> Tensor:  # -> (M,)
    """Estimate the variance due to best rows that the index misses.

    The index finds each of the best rows with probability ``recall``. A missed row is seldom in the sample, so the
    differences in the sample do not include this variance. The very best rows count as found: the probability that one
    of them is missed is at most `MISS_PROBABILITY`.
    """
    recall = max(recall, MIN_RECALL)
    sure = round(MISS_PROBABILITY / (1 - recall))
    squares = cast(Tensor, read.weights)[:, sure:].double().square()
    slots = cast(Tensor, read.ids)[:, sure : sure + SPREAD_CANDIDATES]
    values = tables.values.detach()[slots.clamp(min=0)].to(read.values.dtype)
    differences = ((values - read.values.unsqueeze(1)).double() / size.view(-1, 1, 1)).square().sum(-1)
    next_squares = squares[:, :SPREAD_CANDIDATES]
    spread = (next_squares * differences).sum(-1) / next_squares.sum(-1).clamp(min=MIN_DIVISOR)
    return (1 - recall) / recall * squares.sum(-1) * spread
