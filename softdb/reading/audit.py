"""What top-k reads miss, beside exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Audit"]


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
