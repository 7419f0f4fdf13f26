"""Rows that are searched exactly beside the base index, since their keys are long; and the scale of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.index.faiss_parts import distance_to

# How far a row is from the nearest in a sample tells whether rows lie in clusters: below this part of the distance from
# their middle.
CLUSTERED = 4


# For dot products, in a base of some size, the longest rows may be searched exactly beside it: up to this share of all,
# if the least of them is this much longer than the median.
CROWN_SHARE, CROWN_RATIO = 1 / 16, 1.2


def scale_of(rows: Tensor) -> float:  # (n, d)
    """What a move of a row is far beside, such that neither outliers nor distances between clusters count."""
    if len(rows) < 2:
        return 0.0
    sample = rows[:: max(1, len(rows) // 2**14)]
    apart = float(distance_to(sample, sample.median(dim=0).values).median())
    some = sample[:: max(1, len(sample) // 256)]
    nearest = torch.cdist(some.double(), sample.double()).topk(2, dim=1, largest=False).values[:, 1]
    return min(apart, CLUSTERED * float(nearest.median())) or apart


def longest_rows(keys: Tensor, selection: Selection) -> Tensor:
    """The slots of the rows whose norm stands out, the longest first."""
    norms = torch.linalg.vector_norm(keys[: selection.size], dim=-1, dtype=torch.float32)
    if selection.shared is not None:
        norms[~selection.shared] = 0.0
        usual = norms[selection.shared][:: max(1, selection.shared_count // 2**14)].median()
    else:
        usual = norms[:: max(1, len(norms) // 2**14)].median()
    norms, slots = norms.topk(int(CROWN_SHARE * selection.shared_count))
    longest: Tensor = slots[norms > CROWN_RATIO * usual]
    return longest
