"""Compare top-k reads with exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from softdb.reading.result import Read

__all__ = ["Audit", "compare_reads"]

# Scores this close, in parts of themselves, tie in an audit.
TIE = 1e-5


@dataclass(frozen=True, eq=False)
class Audit:
    """How top-k reads compare with exact ones, for each query, as `SoftKVStore.audit` returns it; float64.

    Attributes:
        k: The number of candidates.
        recall: The share of the k best rows that are among the candidates, (...,); rows that tie are as good, and 1
            where no row may be seen.
        mass: The fraction of the exact softmax that the candidates hold, (...,).
        error: The norm of the difference of the values, in parts of that of the exact ones, (...,).
    """

    k: int
    recall: Tensor
    mass: Tensor
    error: Tensor

    @property
    def mean_recall(self) -> float:
        """The mean of ``recall``."""
        return float(self.recall.mean())

    @property
    def mean_mass(self) -> float:
        """The mean of ``mass``."""
        return float(self.mass.mean())

    @property
    def mean_error(self) -> float:
        """The mean of ``error``."""
        return float(self.error.mean())

    def __str__(self) -> str:
        lowest = float(self.recall.min()) if self.recall.numel() else math.nan
        return (
            f"{self.recall.numel():,} queries, k = {self.k}: recall {self.mean_recall:.4f} (lowest {lowest:.2f}), "
            f"mass {self.mean_mass:.4f}, error {self.mean_error:.4f}"
        )


def compare_reads(exact: Read, found: Read, k: int) -> Audit:
    """Compare a top-k read with an exact one that reports its ``k`` best rows."""
    best, scores = cast(Tensor, exact.scores), cast(Tensor, found.scores)
    there = best > -torch.inf
    # The worst of the k best; rows that tie with it, but for rounding, are as good.
    worst = best.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
    hits = ((scores >= worst - TIE * worst.abs()) & (scores > -torch.inf)).sum(-1)
    count = there.sum(-1)
    recall = torch.where(count > 0, hits.clamp(max=count) / count.clamp(min=1), 1.0)
    total = exact.lse.masked_fill(exact.lse == -torch.inf, 0.0).unsqueeze(-1)
    mass = (scores - total).exp().sum(-1).clamp(max=1.0)
    apart = torch.linalg.vector_norm((found.values - exact.values).double(), dim=-1)
    size = torch.linalg.vector_norm(exact.values.double(), dim=-1)
    error = torch.where(apart > 0, apart / size, 0.0)
    return Audit(k, recall.double(), mass.double(), error)
