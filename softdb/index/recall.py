"""Measure the recall of a search on sample queries, against their exact best rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.backend import backend_for
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.metrics import centre_of, compute_dtype, prepare_query

__all__ = ["MeasuredRecall", "RecallSample"]

# A candidate that scores this much worse than the k-th best row, relatively, ties with it.
TIE_TOLERANCE = 1e-5


class MeasuredRecall(NamedTuple):
    """Hold the recall of sample queries.

    Attributes:
        mean: The lowest mean of a group.
        lower: The lowest mean less its standard error.
    """

    mean: float
    lower: float


class RecallSample:
    """Compare candidates of sample queries with ground truth.

    Args:
        groups: Queries, (m, d) each; the recall is that of the group with the lowest.
        keys: (capacity, d).
        metric: How they are scored.
        selection: Which slots hold rows.
        k: The number of nearest rows.

    Attributes:
        queries: (m, d), those of all groups.
        spec: The metric and filters.
        operand: The queries, prepared for the metric.
        best: The slots of the ground-truth top k, (m, k).
    """

    def __init__(self, groups: list[Tensor], keys: Tensor, metric: str, selection: Selection, k: int) -> None:
        self.queries = torch.cat(groups)
        self.k = k
        self._keys, self._sizes = keys, [len(group) for group in groups]
        self.spec, self.operand, self.best, self._worst = ground_truth_top_k(self.queries, keys, metric, selection, k)

    def hits(self, found: Tensor) -> Tensor:  # (m, c) -> (m, c) bool
        """Test which candidates are as good as the k best rows."""
        scores = backend_for(self.operand).score_at(self.operand, self._keys, found, self.spec)
        return (scores >= self._worst) & (found >= 0)

    def measure(self, hits: Tensor) -> MeasuredRecall:  # (m,): of each query
        """Measure the recall from the number of hits of each query."""
        shares = (hits.clamp(max=self.k) / self.k).split(self._sizes)
        means = [float(part.mean()) for part in shares]
        errors = [float(part.std()) / math.sqrt(len(part)) if len(part) > 1 else 0.0 for part in shares]
        return MeasuredRecall(min(means), min(mean - error for mean, error in zip(means, errors, strict=True)))


def ground_truth_top_k(
    queries: Tensor, keys: Tensor, metric: str, selection: Selection, k: int
) -> tuple[ReadSpec, Tensor, Tensor, Tensor]:
    """Compute ground-truth top-k for a sample of queries.

    Returns:
        The read spec, the queries prepared for it, the slots of the k best rows of each, (m, k), and the least score of
        a row that is as good as these, (m, 1): one that ties with the k-th best is.
    """
    spec = ReadSpec(
        metric,
        centre_of(queries, metric),
        selection,
        compute_dtype(queries, keys),
        tiling=Tiling.for_device(keys.device),
    )
    operand = prepare_query(queries, metric, 1.0, spec.centre, spec.dtype)
    scores, best = backend_for(operand).exact_top_k(operand, keys, spec, k)
    worst = scores[:, -1:]
    return spec, operand, best, worst - TIE_TOLERANCE * worst.abs()
