"""Find norm outliers: long keys, which are searched exactly.

Training makes some keys much longer than others. By dot product these are among the best rows of queries in all
directions, which no list of neighbours predicts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.scoring.metrics import compute_dtype

__all__ = ["OUTLIER_METRICS", "find_norm_outliers"]

# Metrics by which a long key scores high for queries far from it.
OUTLIER_METRICS = ("dot", "scaled_dot")

# Norm outliers are at most this share of the rows, and at least this many times as long as the median.
OUTLIER_SHARE, OUTLIER_NORM_RATIO = 1 / 16, 1.2

# The median norm is that of about this many rows.
MEDIAN_ROWS = 2**14


def find_norm_outliers(keys: Tensor, selection: Selection) -> Tensor:  # (capacity, d) -> (m,)
    """Find the slots of the rows with outstanding norms, the longest first."""
    norms = torch.linalg.vector_norm(keys[: selection.size], dim=-1, dtype=compute_dtype(keys))
    if selection.shared is not None:
        norms[~selection.shared] = 0.0
        median = norms[selection.shared][:: max(1, selection.shared_count // MEDIAN_ROWS)].median()
    else:
        median = norms[:: max(1, len(norms) // MEDIAN_ROWS)].median()
    norms, slots = norms.topk(int(OUTLIER_SHARE * selection.shared_count))
    outliers: Tensor = slots[norms > OUTLIER_NORM_RATIO * median]
    return outliers
