"""Track how far keys have moved since the base index merged their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.index.faiss_parts import compute_distances, to_vectors
from softdb.table.slots import resize

__all__ = ["KeyMovement"]

# Choose the list of a row again when the row has moved by more than the first distance in total since the last choice,
# or by more than the second distance since the last merge. The unit is `KeyMovement.scale`.
LIST_TOLERANCE, JUMP_TOLERANCE = 1.0, 0.25

# Rows are clustered if this number times their median distance from the nearest row of a sample is below their median
# distance from the center of all rows.
CLUSTER_RATIO = 4

# Approximate numbers of rows from which the scale is measured: of the sample of all rows, and of the rows in it whose
# nearest neighbors are searched.
SCALE_ROWS, NEIGHBOR_ROWS = 2**14, 256

# Number of elements of keys that are compared with their copies at once.
COMPARED_ELEMENTS = 2**22


def measure_scale(rows: Tensor) -> float:  # (n, d)
    """Measure the scale of moves, robust to outliers and to distant clusters.

    Returns:
        The median distance of the rows from their center. If they are clustered, `CLUSTER_RATIO` times their median
        distance from the nearest row of a sample.
    """
    if len(rows) < 2:
        return 0.0
    sample = rows[:: max(1, len(rows) // SCALE_ROWS)]
    spread = float(compute_distances(sample, sample.median(dim=0).values).median())
    subset = sample[:: max(1, len(sample) // NEIGHBOR_ROWS)]
    nearest = torch.cdist(subset.double(), sample.double()).topk(2, dim=1, largest=False).values[:, 1]
    return min(spread, CLUSTER_RATIO * float(nearest.median())) or spread


class KeyMovement:
    """Movement of keys since the base index merged their rows.

    Args:
        slots: Slots of the rows, (n,), ascending, on the CPU.
        rows: Vectors of the rows, (n, d) float32.
        capacity: Number of slots.
        copied: Whether to keep a copy of the vectors. Without it, every changed key counts as moved.

    Attributes:
        copy: Vectors that the base index merged, (capacity, d) float32, or None.
        scale: Unit of the tolerances: see `measure_scale`.
    """

    def __init__(self, slots: Tensor, rows: Tensor, capacity: int, *, copied: bool) -> None:
        self.scale = measure_scale(rows)
        self.copy: Tensor | None = None
        self._drift: Tensor | None = None  # (capacity,): path length since the list was chosen
        if copied:
            # ``rows`` is a copy already. It is kept as it is if it has a row for each slot.
            self.copy = rows if len(rows) == capacity else rows.new_zeros(capacity, rows.shape[1])
            if self.copy is not rows:
                self.copy[slots.to(rows.device)] = rows
            self._drift = torch.zeros(capacity, device="cpu")

    def resize(self, capacity: int) -> None:
        """Change the number of slots."""
        self.copy = None if self.copy is None else resize(self.copy, capacity)
        self._drift = None if self._drift is None else resize(self._drift, capacity)

    def find_moved_slots(self, slots: Tensor, keys: Tensor, metric: str, tolerance: float) -> Tensor:
        """Find ``slots`` whose key has moved by more than ``tolerance``."""
        if self.copy is None:
            return slots
        distances = []
        for part in slots.split(max(1, COMPARED_ELEMENTS // keys.shape[1])):
            distances.append(
                compute_distances(to_vectors(keys.index_select(0, part), metric), self.copy.index_select(0, part))
            )
        distance = torch.cat(distances) if distances else slots.new_zeros(0)
        return slots[~(distance <= tolerance * self.scale)]  # a NaN counts as moved

    def needs_new_list(self, slots: Tensor, rows: Tensor) -> Tensor:  # (m,) on the CPU, (m, d) -> (m,) bool
        """Return which rows need a new list, and record how far they moved."""
        if self.copy is None or self._drift is None:
            return torch.ones(len(slots), dtype=torch.bool, device="cpu")
        moved = compute_distances(rows, self.copy.index_select(0, slots.to(rows.device))).cpu()
        drift = self._drift[slots] + moved
        far = ~((drift <= LIST_TOLERANCE * self.scale) & (moved <= JUMP_TOLERANCE * self.scale))
        self._drift[slots] = drift.masked_fill_(far, 0.0)
        return far

    def record_new_lists(self, slots: Tensor) -> None:
        """Record that a list has been chosen for the rows at ``slots``."""
        if self._drift is not None:
            self._drift[slots] = 0.0

    def record_rows(self, slots: Tensor, rows: Tensor) -> None:
        """Record the vectors that the base index has merged at ``slots``."""
        if self.copy is not None:
            self.copy.index_copy_(0, slots.to(rows.device), rows)
