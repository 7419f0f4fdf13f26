"""Map from ids to slots, and the free slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb._checks import list_ids
from softdb.errors import UnknownIdError

__all__ = ["NO_SLOTS", "FreeSlots", "SlotTable", "resize", "slots_to_index"]

NO_SLOTS = torch.empty(0, dtype=torch.int64, device="cpu")
# Maximum number of recently freed slots in a separate list. A small deletion copies only this list.
MAX_RECENT_SLOTS = 1024


def resize(tensor: Tensor, capacity: int, fill: float = 0) -> Tensor:
    """Copy ``tensor`` to ``capacity`` rows, truncated or padded with ``fill``."""
    kept = min(len(tensor), capacity)
    larger = tensor.new_empty(capacity, *tensor.shape[1:])
    larger[:kept] = tensor[:kept]
    larger[kept:] = fill
    return larger


@dataclass(frozen=True, eq=False)
class FreeSlots:
    """Immutable set of free slots; the lowest slots are filled first.

    Taking and freeing slots returns another set, which shares memory with this one.

    Attributes:
        used: Number of slots up to the highest one that has held a row since the table was created or loaded.
        holes: Free slots below ``used``, (m,) int64, ascending.
        recent: Further free slots below ``used``, freed recently, ascending.
    """

    used: int = 0
    holes: Tensor = NO_SLOTS
    recent: Tensor = NO_SLOTS

    @classmethod
    def from_mask(cls, occupied: Tensor) -> FreeSlots:  # (capacity,) bool, on the CPU
        """Create the set of slots that are not ``occupied``."""
        live = occupied.nonzero().squeeze(-1)
        used = int(live[-1]) + 1 if len(live) else 0
        return cls(used, (~occupied[:used]).nonzero().squeeze(-1))

    def __len__(self) -> int:
        return len(self.holes) + len(self.recent)

    def free_all(self) -> FreeSlots:
        """Return the set of all slots up to the highest that has held a row."""
        return FreeSlots(self.used, torch.arange(self.used, device="cpu"))

    def take(self, count: int) -> tuple[Tensor, FreeSlots]:
        """Take the ``count`` lowest free slots.

        Returns:
            The slots, ascending, and the set of the remaining free slots.
        """
        if len(self) == 0:
            return torch.arange(self.used, self.used + count, device="cpu"), FreeSlots(self.used + count)
        slots, holes, recent = self.holes[:count], self.holes, self.recent
        if len(recent):
            slots = torch.cat([slots, recent[:count]]).sort().values[:count]
            last = slots[-1:] if len(slots) else slots.new_full((1,), -1)
            holes = holes[int(torch.searchsorted(holes, last, right=True)) :]
            recent = recent[int(torch.searchsorted(recent, last, right=True)) :]
        else:
            holes = holes[len(slots) :]
        fresh = count - len(slots)
        if fresh:
            slots = torch.cat([slots, torch.arange(self.used, self.used + fresh, device="cpu")])
        return slots, FreeSlots(self.used + fresh, holes, recent)

    def free(self, slots: Tensor) -> FreeSlots:
        """Return the set of free slots with ``slots`` added, which have no duplicates."""
        if len(slots) == 0:
            return self
        recent = torch.cat([self.recent, slots]).sort().values
        if len(recent) <= MAX_RECENT_SLOTS:
            return FreeSlots(self.used, self.holes, recent)
        return FreeSlots(self.used, torch.cat([self.holes, recent]).sort().values)

    def occupied(self) -> Tensor:
        """Return all slots below ``used`` that are not free, ascending."""
        mask = torch.ones(self.used, dtype=torch.bool, device="cpu")
        mask[self.holes] = mask[self.recent] = False
        return mask.nonzero().squeeze(-1)

    def all(self) -> Tensor:
        """Return all free slots below ``used``, ascending."""
        return torch.cat([self.holes, self.recent]).sort().values


class SlotTable:
    """Map from id to slot.

    Ids that are small relative to the number of rows, such as assigned ids, are positions in an array with eight bytes
    per id. A lookup of a million ids takes about a millisecond. A dict holds the other ids. `put` and `remove` are
    idempotent.
    """

    def __init__(self) -> None:
        # One tuple, so that array and dict are replaced together.
        self._map: tuple[Tensor, dict[int, int]] = (NO_SLOTS, {})

    @classmethod
    def from_ids(cls, ids: Tensor, slots: Tensor) -> SlotTable:
        """Create the map from ``ids`` to ``slots``."""
        table = cls()
        table.widen(ids, 0)
        table.put(ids, slots)
        return table

    @property
    def entries(self) -> int:
        """Number of ids in the map."""
        array, others = self._map
        return int((array >= 0).sum()) + len(others)

    def find(self, ids: Tensor) -> Tensor:  # (m,) -> (m,)
        """Return the slots of ids, -1 for unknown ids."""
        array, others = self._map
        small = ids < len(array)
        if small.all():
            return array[ids]
        slots = torch.empty_like(ids)
        slots[small] = array[ids[small]]
        found = [others.get(number, -1) for number in ids[~small].tolist()]
        slots[~small] = torch.tensor(found, dtype=torch.int64, device="cpu")
        return slots

    def find_padded(self, ids: Tensor) -> Tensor:  # (*shape,) -> (*shape,)
        """Return the slots of ids, -1 for unknown ids and for padding (-1)."""
        slots, given = torch.full_like(ids, -1), ids >= 0
        slots[given] = self.find(ids[given])
        return slots

    def slots_of(self, name: str, ids: Tensor) -> Tensor:  # (m,) -> (m,)
        """Return the slots of ids, which must all be known.

        Args:
            name: The name of the argument, for the error message.
            ids: The ids.

        Raises:
            UnknownIdError: An id has no row.
        """
        slots = self.find(ids)
        missing = ids[slots < 0]
        if len(missing):
            raise UnknownIdError(f"{name}: expected ids of rows in the store, got unknown {list_ids(missing)}")
        return slots

    def put(self, ids: Tensor, slots: Tensor) -> None:
        """Map ``ids`` to ``slots``; call `widen` first."""
        array, others = self._map
        small = ids < len(array)
        if small.all():
            array[ids] = slots
        else:
            array[ids[small]] = slots[small]
            others.update(zip(ids[~small].tolist(), slots[~small].tolist(), strict=True))

    def remove(self, ids: Tensor) -> None:
        """Remove ids, if present."""
        array, others = self._map
        small = ids < len(array)
        array[ids[small]] = -1
        for number in ids[~small].tolist():
            others.pop(number, None)

    def widen(self, ids: Tensor, rows: int) -> None:
        """Widen the array for new ``ids``, up to about four entries per row.

        Args:
            ids: Ids to put next.
            rows: The present number of rows.
        """
        array, others = self._map
        limit = 4 * (rows + len(ids)) + 1024
        largest = int(ids.max()) if len(ids) else -1
        if largest >= limit:
            within = ids[ids < limit]
            largest = int(within.max()) if len(within) else -1
        if largest < len(array):
            return
        size = min(limit, max(largest + 1, 2 * len(array)))
        array = resize(array, size, fill=-1)
        moving = [number for number in others if number < size]
        if moving:
            array[torch.tensor(moving, device="cpu")] = torch.tensor(
                [others[number] for number in moving], device="cpu"
            )
            others = {number: slot for number, slot in others.items() if number >= size}
        self._map = (array, others)


def slots_to_index(slots: Tensor) -> slice | Tensor:
    """Convert slots to an index: a slice if they are consecutive."""
    count = len(slots)
    if count == 0:
        return slots
    first = int(slots[0])
    in_order = count == 1 or (int(slots[-1]) == first + count - 1 and bool((slots.diff() == 1).all()))
    return slice(first, first + count) if in_order else slots
