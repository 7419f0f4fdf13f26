"""Compare top-k reads with exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from softdb.reading.result import Read

__all__ = ["Audit", "compare_reads"]

# Relative difference up to which two scores count as a tie.
TIE_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Audit:
    """Recall, mass and error of top-k reads, for each query, float64.

    `SoftKVStore.audit` returns it; it compares top-k reads with exact reads.

    Attributes:
        k: Number of candidates.
        recall: Fraction of the k best rows that are candidates, (...,). A candidate also counts as one of the k best if
            its score equals that of the k-th best row, up to rounding. 1 where no row may be seen.
        mass: Fraction of the exact softmax that the candidates hold, (...,).
        error: ``norm(topk values - exact values) / norm(exact values)``, (...,).
    """

    k: int
    recall: Tensor
    mass: Tensor
    error: Tensor

    @property
    def mean_recall(self) -> float:
        """Mean of ``recall``."""
        return float(self.recall.mean())

    @property
    def mean_mass(self) -> float:
        """Mean of ``mass``."""
        return float(self.mass.mean())

    @property
    def mean_error(self) -> float:
        """Mean of ``error``."""
        return float(self.error.mean())

    def __str__(self) -> str:
        lowest = float(self.recall.min()) if self.recall.numel() else math.nan
        return (
            f"{self.recall.numel():,} queries, k = {self.k}: recall {self.mean_recall:.4f} (lowest {lowest:.2f}), "
            f"mass {self.mean_mass:.4f}, error {self.mean_error:.4f}"
        )


def compare_reads(exact: Read, topk: Read, k: int) -> Audit:
    """Compare a top-k read with an exact read.

    Args:
        exact: An exact read that reports its ``k`` best rows.
        topk: A top-k read of the same queries.
        k: Number of candidates.
    """
    best, scores = cast(Tensor, exact.scores), cast(Tensor, topk.scores)
    present = best > -torch.inf
    # The lowest of the k best scores. A row that ties with it up to rounding counts as one of the k best.
    worst = best.masked_fill(~present, torch.inf).amin(-1, keepdim=True)
    hits = ((scores >= worst - TIE_TOLERANCE * worst.abs()) & (scores > -torch.inf)).sum(-1)
    count = present.sum(-1)
    recall = torch.where(count > 0, hits.clamp(max=count) / count.clamp(min=1), 1.0)
    total = exact.lse.masked_fill(exact.lse == -torch.inf, 0.0).unsqueeze(-1)
    mass = (scores - total).exp().sum(-1).clamp(max=1.0)
    distance = torch.linalg.vector_norm((topk.values - exact.values).double(), dim=-1)
    size = torch.linalg.vector_norm(exact.values.double(), dim=-1)
    error = torch.where(distance > 0, distance / size, 0.0)
    return Audit(k, recall.double(), mass.double(), error)
