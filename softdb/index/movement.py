"""Track how far keys have moved since the base index took their rows in."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.index.faiss_parts import distance_to, to_vectors
from softdb.table.slots import resized

__all__ = ["KeyMovement"]

# A row's list is chosen again when the row has moved this far since, or this far at once, in units of the scale.
LIST_TOLERANCE, JUMP_TOLERANCE = 1.0, 0.25

# Rows lie in clusters where the median distance to the nearest row of a sample is below 1 / CLUSTER_RATIO of that to
# the middle of all.
CLUSTER_RATIO = 4

# Samples that the scale is measured on: rows, and rows whose nearest neighbour is looked for.
SCALE_ROWS, NEIGHBOUR_ROWS = 2**14, 256

# Number of elements that are compared with their copies at a time.
COMPARED_ELEMENTS = 2**22


def scale_of(rows: Tensor) -> float:  # (n, d)
    """Measure the scale of moves, without outliers and distances of clusters.

    Returns:
        The median distance of the rows from their middle, or, where they lie in clusters, a few times that from the
        nearest row of a sample.
    """
    if len(rows) < 2:
        return 0.0
    sample = rows[:: max(1, len(rows) // SCALE_ROWS)]
    apart = float(distance_to(sample, sample.median(dim=0).values).median())
    some = sample[:: max(1, len(sample) // NEIGHBOUR_ROWS)]
    nearest = torch.cdist(some.double(), sample.double()).topk(2, dim=1, largest=False).values[:, 1]
    return min(apart, CLUSTER_RATIO * float(nearest.median())) or apart


class KeyMovement:
    """Compare keys with copies of them from when the base took their rows in.

    Args:
        slots: (n,) ascending, on the CPU.
        rows: (n, d) float32, the vectors at these slots.
        capacity: The number of slots.
        copied: Whether to keep copies: without them, every changed key counts as moved.

    Attributes:
        copy: The vectors as the base took them in, (capacity, d) float32, or None.
        scale: The unit of tolerances, see `scale_of`.
    """

    def __init__(self, slots: Tensor, rows: Tensor, capacity: int, *, copied: bool) -> None:
        self.scale = scale_of(rows)
        self.copy: Tensor | None = None
        self._drift: Tensor | None = None  # (capacity,): the way that rows have come since their list was chosen
        if copied:
            # `rows` are the caller's own copy: they become this one where there is one for each slot.
            self.copy = rows if len(rows) == capacity else rows.new_zeros(capacity, rows.shape[1])
            if self.copy is not rows:
                self.copy[slots.to(rows.device)] = rows
            self._drift = torch.zeros(capacity, device="cpu")

    def resize(self, capacity: int) -> None:
        """Make room for more slots."""
        self.copy = None if self.copy is None else resized(self.copy, capacity)
        self._drift = None if self._drift is None else resized(self._drift, capacity)

    def moved_slots(self, slots: Tensor, keys: Tensor, metric: str, tolerance: float) -> Tensor:
        """Return those of ``slots`` whose key has moved by more than ``tolerance``."""
        if self.copy is None:
            return slots
        apart = []
        for part in slots.split(max(1, COMPARED_ELEMENTS // keys.shape[1])):
            apart.append(distance_to(to_vectors(keys.index_select(0, part), metric), self.copy.index_select(0, part)))
        distance = torch.cat(apart) if apart else slots.new_zeros(0)
        return slots[~(distance <= tolerance * self.scale)]  # a NaN counts as moved

    def needs_new_list(self, slots: Tensor, rows: Tensor) -> Tensor:  # (m,) on the CPU, (m, d) -> (m,) bool
        """Test which rows have moved too far for their list, and record the moves."""
        if self.copy is None or self._drift is None:
            return torch.ones(len(slots), dtype=torch.bool, device="cpu")
        moved = distance_to(rows, self.copy.index_select(0, slots.to(rows.device))).cpu()
        drift = self._drift[slots] + moved
        far = ~((drift <= LIST_TOLERANCE * self.scale) & (moved <= JUMP_TOLERANCE * self.scale))
        self._drift[slots] = drift.masked_fill_(far, 0.0)
        return far

    def record_new_lists(self, slots: Tensor) -> None:
        """Record that a list has been chosen for the rows at ``slots``."""
        if self._drift is not None:
            self._drift[slots] = 0.0

    def record_rows(self, slots: Tensor, rows: Tensor) -> None:
        """Record the vectors that the base has taken in at ``slots``."""
        if self.copy is not None:
            self.copy.index_copy_(0, slots.to(rows.device), rows)
