"""Log of changed slots by version, and states of tensors."""

from __future__ import annotations

import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ChangeLog", "TensorState", "state_of", "version_of"]


class TensorState(NamedTuple):
    """Identity, address and version counter of a tensor.

    The tensor is held by weak reference, not by ``id()``: Python reuses the ids of freed objects.
    """

    tensor: weakref.ref[Tensor]
    data_ptr: int
    version: int

    def equals(self, other: TensorState | None) -> bool:
        """Return whether both states are of the same tensor, with no write in between."""
        return other is not None and self.tensor() is other.tensor() is not None and self[1:] == other[1:]


def state_of(tensor: Tensor) -> TensorState:
    """Return the present state of a tensor."""
    return TensorState(weakref.ref(tensor), tensor.data_ptr(), version_of(tensor))


def version_of(tensor: Tensor) -> int:
    """Return torch's version counter of a tensor; 0 for an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


# Maximum length of the log, in slots: this fraction of the rows, but at least this number.
MAX_LOGGED_FRACTION, MIN_LOGGED_SLOTS = 1 / 8, 4096


class ChangeLog:
    """Log of recently changed slots, which avoids a scan of all slots."""

    def __init__(self) -> None:
        # One entry per change: version, slots, whether keys changed, and the number of slots in all entries up to here.
        self._entries: deque[tuple[int, Tensor, bool, int]] = deque()
        self._complete_since = 0  # The log contains every change after this version.

    def record(self, version: int, slots: Tensor, keys: bool, *, rows: int) -> None:
        """Append a change to the log, unless its version is recorded already.

        ``slots`` may contain duplicates, and be on any device.

        The oldest entries are dropped when the log exceeds its limit for a table of ``rows`` rows.
        """
        entries, limit = self._entries, max(MIN_LOGGED_SLOTS, int(MAX_LOGGED_FRACTION * rows))
        if not entries or entries[-1][0] != version:
            entries.append((version, slots, keys, len(slots) + (entries[-1][3] if entries else 0)))
        while entries[-1][3] - entries[0][3] + len(entries[0][1]) > limit:
            self._complete_since = entries[0][0]
            entries.popleft()
            if not entries:
                return

    def since(self, version: int, *, keys: bool) -> Tensor | None:
        """Return the slots changed after ``version``, ascending and unique.

        Args:
            version: The version of the table.
            keys: Whether to return only slots whose keys changed.

        Returns:
            (m,) int64 on the device of the slots; None if the log no longer covers these changes.
        """
        if version < self._complete_since:
            return None
        recent = []
        for changed_at, slots, of_keys, _ in reversed(self._entries):
            if changed_at <= version:
                break
            if of_keys or not keys:
                recent.append(slots)
        return torch.cat(recent).unique() if recent else torch.empty(0, dtype=torch.int64, device="cpu")
