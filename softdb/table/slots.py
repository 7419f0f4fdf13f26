"""Slots: which row lies in which, and which are free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb._checks import list_ids
from softdb.errors import UnknownIdError

__all__ = ["NO_SLOTS", "FreeSlots", "SlotTable", "place_of", "resized"]

NO_SLOTS = torch.empty(0, dtype=torch.int64, device="cpu")
# As many slots that were freed lately are kept apart, so that one more does not cost a look at all.
RECENT = 1024


def resized(tensor: Tensor, capacity: int, fill: float = 0) -> Tensor:
    """A copy of ``tensor`` with ``capacity`` rows: cut, or filled up with ``fill``."""
    kept = min(len(tensor), capacity)
    larger = tensor.new_empty(capacity, *tensor.shape[1:])
    larger[:kept] = tensor[:kept]
    larger[kept:] = fill
    return larger


@dataclass(frozen=True, eq=False)
class FreeSlots:
    """The slots below ``used`` without a row: holes that later rows fill, the lowest first.

    It never changes: taking and freeing slots makes another, which shares memory with this one.

    Attributes:
        used: No slot from here on has ever held a row.
        holes: (m,) ascending int64.
        recent: A few more of them, ascending.
    """

    used: int = 0
    holes: Tensor = NO_SLOTS
    recent: Tensor = NO_SLOTS

    @classmethod
    def of(cls, there: Tensor) -> FreeSlots:  # (capacity,) bool, on the CPU
        """Return the free slots of a table whose rows lie where ``there`` says."""
        live = there.nonzero().squeeze(-1)
        used = int(live[-1]) + 1 if len(live) else 0
        return cls(used, (~there[:used]).nonzero().squeeze(-1))

    def __len__(self) -> int:
        return len(self.holes) + len(self.recent)

    def take(self, count: int) -> tuple[Tensor, FreeSlots]:
        """Return the ``count`` lowest free slots, ascending, and what is free without them."""
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
        """Return what is free with ``slots``, each given once."""
        if len(slots) == 0:
            return self
        recent = torch.cat([self.recent, slots]).sort().values
        if len(recent) <= RECENT:
            return FreeSlots(self.used, self.holes, recent)
        return FreeSlots(self.used, torch.cat([self.holes, recent]).sort().values)

    def all(self) -> Tensor:
        """Return every hole, ascending."""
        return torch.cat([self.holes, self.recent]).sort().values


class SlotTable:
    """The map from id to slot.

    Ids that are small beside the number of rows, as assigned ones are, index an array: eight bytes each, and a
    million are found in a millisecond. The others live in a dict. Entering ids and forgetting them may be repeated.
    """

    def __init__(self) -> None:
        # Together, so that both change at once.
        self._map: tuple[Tensor, dict[int, int]] = (NO_SLOTS, {})

    @classmethod
    def of(cls, ids: Tensor, slots: Tensor) -> SlotTable:
        """Return the map of ``ids`` to ``slots``."""
        table = cls()
        table.widen(ids, 0)
        table.put(ids, slots)
        return table

    @property
    def entries(self) -> int:
        """How many different ids there are."""
        array, others = self._map
        return int((array >= 0).sum()) + len(others)

    def find(self, ids: Tensor) -> Tensor:  # (m,) -> (m,), -1 where unknown
        """Return the slots of ids."""
        array, others = self._map
        small = ids < len(array)
        if small.all():
            return array[ids]
        slots = torch.empty_like(ids)
        slots[small] = array[ids[small]]
        found = [others.get(number, -1) for number in ids[~small].tolist()]
        slots[~small] = torch.tensor(found, dtype=torch.int64, device="cpu")
        return slots

    def slots_of(self, name: str, ids: Tensor) -> Tensor:  # (m,) -> (m,)
        """Return the slots of ids; an id without a row is an error that names the argument ``name``."""
        slots = self.find(ids)
        missing = ids[slots < 0]
        if len(missing):
            raise UnknownIdError(f"{name}: expected ids of rows in the store, got unknown {list_ids(missing)}")
        return slots

    def put(self, ids: Tensor, slots: Tensor) -> None:
        """Enter ids, for which there is room: see `widen`."""
        array, others = self._map
        small = ids < len(array)
        if small.all():
            array[ids] = slots
        else:
            array[ids[small]] = slots[small]
            others.update(zip(ids[~small].tolist(), slots[~small].tolist(), strict=True))

    def remove(self, ids: Tensor) -> None:
        """Forget ids."""
        array, others = self._map
        small = ids < len(array)
        array[ids[small]] = -1
        for number in ids[~small].tolist():
            others.pop(number, None)

    def widen(self, ids: Tensor, rows: int) -> None:
        """Let the array reach the largest of new ``ids`` that keeps it within a few entries for each of ``rows``."""
        array, others = self._map
        limit = 4 * (rows + len(ids)) + 1024
        largest = int(ids.max()) if len(ids) else -1
        if largest >= limit:
            within = ids[ids < limit]
            largest = int(within.max()) if len(within) else -1
        if largest < len(array):
            return
        size = min(limit, max(largest + 1, 2 * len(array)))
        array = resized(array, size, fill=-1)
        moving = [number for number in others if number < size]
        if moving:
            array[torch.tensor(moving, device="cpu")] = torch.tensor(
                [others[number] for number in moving], device="cpu"
            )
            others = {number: slot for number, slot in others.items() if number >= size}
        self._map = (array, others)


def place_of(slots: Tensor) -> slice | Tensor:
    """``slots`` as an index, by a slice where they follow each other."""
    count = len(slots)
    if count == 0:
        return slots
    first = int(slots[0])
    in_order = count == 1 or (int(slots[-1]) == first + count - 1 and bool((slots.diff() == 1).all()))
    return slice(first, first + count) if in_order else slots
