"""What has changed: slots, by version; and tensors that something else may write to, by the counters of torch."""

from __future__ import annotations

import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ChangeLog", "TensorState", "state_of", "version_of"]


class TensorState(NamedTuple):
    """What changes when torch writes to a table; by reference, since another table may get the number of a dead one."""

    table: weakref.ref[Tensor]
    place: int
    version: int

    def equals(self, other: TensorState | None) -> bool:
        """Whether it is that of the same table, not written to in between."""
        return other is not None and self.table() is other.table() is not None and self[1:] == other[1:]


def state_of(table: Tensor) -> TensorState:
    """Return the present state of a tensor."""
    return TensorState(weakref.ref(table), table.data_ptr(), version_of(table))


def version_of(table: Tensor) -> int:
    """Return how often torch has counted a write to ``table``; it counts none to inference tensors."""
    return 0 if table.is_inference() else table._version


# The log names at most this share of the slots, or as many.
LOGGED_SHARE, LOGGED_SLOTS = 1 / 8, 4096


class ChangeLog:
    """Which slots changed at the latest versions, so that a small change is found without a look at every slot."""

    def __init__(self) -> None:
        # Versions, slots, whether their keys changed, and how many slots all entries so far have named.
        self._entries: deque[tuple[int, Tensor, bool, int]] = deque()
        self._complete_since = 0  # every later change is in it

    def record(self, version: int, slots: Tensor, keys: bool, *, rows: int) -> None:
        """Add a change to a table of so many ``rows``, unless it is there; forget the oldest where they are many."""
        entries, limit = self._entries, max(LOGGED_SLOTS, int(LOGGED_SHARE * rows))
        if not entries or entries[-1][0] != version:
            entries.append((version, slots, keys, len(slots) + (entries[-1][3] if entries else 0)))
        while entries[-1][3] - entries[0][3] + len(entries[0][1]) > limit:
            self._complete_since = entries[0][0]
            entries.popleft()
            if not entries:
                return

    def since(self, version: int, *, keys: bool) -> Tensor | None:
        """Return the slots changed after ``version``, ascending, each once; None if that has been forgotten."""
        if version < self._complete_since:
            return None
        recent = []
        for changed_at, slots, of_keys, _ in reversed(self._entries):
            if changed_at <= version:
                break
            if of_keys or not keys:
                recent.append(slots)
        return torch.cat(recent).unique() if recent else torch.empty(0, dtype=torch.int64, device="cpu")
