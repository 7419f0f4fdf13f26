"""Find norm outliers: keys with large norms, which are searched exactly.

Training makes some keys much longer than others. By dot product, such rows are among the best even for queries that are
far from them. A search of the lists nearest to a query may therefore not find them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.scoring.metrics import compute_dtype

__all__ = ["OUTLIER_METRICS", "find_norm_outliers"]

# Metrics by which a long key has high scores for queries far from it.
OUTLIER_METRICS = ("dot", "scaled_dot")

# Norm outliers are at most this fraction of the rows, and their norms are at least this many times the median norm.
OUTLIER_FRACTION, OUTLIER_NORM_RATIO = 1 / 16, 1.2

# The median norm is taken over a sample of about this many rows.
MEDIAN_ROWS = 2**14


def find_norm_outliers(keys: Tensor, selection: Selection) -> Tensor:  # (capacity, d) -> (m,)
    """Find the slots of norm outliers, in descending order of norm."""
    norms = torch.linalg.vector_norm(keys[: selection.size], dim=-1, dtype=compute_dtype(keys))
    if selection.shared is not None:
        norms[~selection.shared] = 0.0
        median = norms[selection.shared][:: max(1, selection.shared_count // MEDIAN_ROWS)].median()
    else:
        median = norms[:: max(1, len(norms) // MEDIAN_ROWS)].median()
    norms, slots = norms.topk(int(OUTLIER_FRACTION * selection.shared_count))
    outliers: Tensor = slots[norms > OUTLIER_NORM_RATIO * median]
    return outliers
