"""The map from id to slot."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SlotTable", "resized"]


def resized(tensor: Tensor, capacity: int, fill: float = 0) -> Tensor:
    """A copy of ``tensor`` with ``capacity`` rows: cut, or filled up with ``fill``."""
    kept = min(len(tensor), capacity)
    larger = tensor.new_empty(capacity, *tensor.shape[1:])
    larger[:kept] = tensor[:kept]
    larger[kept:] = fill
    return larger


class SlotTable:
    """The map from id to slot.

    Ids that are small beside the number of rows, as assigned ones are, index an array: eight bytes each, and a
    million are found in a millisecond. The others live in a dict.
    """

    def __init__(self) -> None:
        self._array = torch.empty(0, dtype=torch.int64, device="cpu")
        self._dict: dict[int, int] = {}
        self._count = 0

    @property
    def entries(self) -> int:
        """How many different ids there are."""
        return int((self._array >= 0).sum()) + len(self._dict)

    def find(self, ids: Tensor) -> Tensor:  # (m,) -> (m,), -1 where unknown
        """Return the slots of ids."""
        small = ids < len(self._array)
        if small.all():
            return self._array[ids]
        slots = torch.empty_like(ids)
        slots[small] = self._array[ids[small]]
        found = [self._dict.get(number, -1) for number in ids[~small].tolist()]
        slots[~small] = torch.tensor(found, dtype=torch.int64, device="cpu")
        return slots

    def put(self, ids: Tensor, slots: Tensor) -> None:
        """Enter new ids."""
        self.widen(ids)
        self._count += len(ids)
        small = ids < len(self._array)
        if small.all():
            self._array[ids] = slots
        else:
            self._array[ids[small]] = slots[small]
            self._dict.update(zip(ids[~small].tolist(), slots[~small].tolist(), strict=True))

    def remove(self, ids: Tensor) -> None:
        """Forget ids that are there."""
        self._count -= len(ids)
        small = ids < len(self._array)
        self._array[ids[small]] = -1
        for number in ids[~small].tolist():
            del self._dict[number]

    def widen(self, ids: Tensor) -> None:
        """Let the array reach the largest of the new ``ids`` that keeps it within a few entries per row."""
        limit = 4 * (self._count + len(ids)) + 1024
        largest = int(ids.max()) if len(ids) else -1
        if largest >= limit:
            within = ids[ids < limit]
            largest = int(within.max()) if len(within) else -1
        if largest < len(self._array):
            return
        size = min(limit, max(largest + 1, 2 * len(self._array)))
        self._array = resized(self._array, size, fill=-1)
        moving = [number for number in self._dict if number < size] if self._dict else []
        for number in moving:
            self._array[number] = self._dict.pop(number)
