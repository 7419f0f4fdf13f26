"""Measure the recall of a search on sample queries, against exact search."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.backend import backend_for
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.metrics import compute_center, compute_dtype, prepare_query

__all__ = ["MeasuredRecall", "RecallSample"]

# A candidate ties with the k-th best row if its score is at most this much lower, relative to the score of that row.
TIE_TOLERANCE = 1e-5


class MeasuredRecall(NamedTuple):
    """Measured recall of sample queries.

    Attributes:
        mean: Mean recall of the worst group.
        lower: Minimum over the groups of the mean recall minus its standard error.
    """

    mean: float
    lower: float


class RecallSample:
    """Sample queries with their ground-truth top k.

    Args:
        groups: Groups of queries, (m, d) each; the recall is that of the worst group.
        keys: Keys by slot, (capacity, d).
        metric: Metric of the scores.
        selection: Slots that hold rows.
        k: Number of nearest rows.

    Attributes:
        queries: Queries of all groups, (m, d).
        spec: Metric and filters.
        operand: Queries prepared for the metric, (m, w).
        best: Slots of the ground-truth top k, (m, k).
    """

    def __init__(self, groups: list[Tensor], keys: Tensor, metric: str, selection: Selection, k: int) -> None:
        self.queries = torch.cat(groups)
        self.k = k
        self._keys, self._sizes = keys, [len(group) for group in groups]
        self.spec, self.operand, self.best, self._worst = ground_truth_top_k(self.queries, keys, metric, selection, k)

    def hits(self, found: Tensor) -> Tensor:  # (m, c) -> (m, c) bool
        """Return which candidates score at least as high as, or tie with, the k-th row."""
        scores = backend_for(self.operand).score_at(self.operand, self._keys, found, self.spec)
        return (scores >= self._worst) & (found >= 0)

    def measure(self, hits: Tensor) -> MeasuredRecall:  # (m,): of each query
        """Compute the recall from the number of hits of each query."""
        recalls = (hits.clamp(max=self.k) / self.k).split(self._sizes)
        means = [float(part.mean()) for part in recalls]
        errors = [float(part.std()) / math.sqrt(len(part)) if len(part) > 1 else 0.0 for part in recalls]
        return MeasuredRecall(min(means), min(mean - error for mean, error in zip(means, errors, strict=True)))


def ground_truth_top_k(
    queries: Tensor, keys: Tensor, metric: str, selection: Selection, k: int
) -> tuple[ReadSpec, Tensor, Tensor, Tensor]:
    """Compute ground-truth top-k for a sample of queries.

    Returns:
        The read spec, the queries prepared for it, the slots of the k best rows, (m, k), and the lowest score that ties
        with that of the k-th best row, (m, 1).
    """
    spec = ReadSpec(
        metric,
        compute_center(queries, metric),
        selection,
        compute_dtype(queries, keys),
        tiling=Tiling.for_device(keys.device),
    )
    operand = prepare_query(queries, metric, 1.0, spec.center, spec.dtype)
    scores, best = backend_for(operand).exact_top_k(operand, keys, spec, k)
    worst = scores[:, -1:]
    return spec, operand, best, worst - TIE_TOLERANCE * worst.abs()
