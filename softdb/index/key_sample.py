"""Detect writes to keys that torch's version counters miss, such as by ``.data``."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.index.base import Base
from softdb.table.storage import RowStorage

__all__ = ["KeySample"]

# Number of rows whose keys are compared before each search.
SAMPLE_ROWS = 64


class KeySample:
    """Copies of the keys of a sample of rows, updated after every known write.

    Args:
        base: The base index whose rows are sampled.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self._slots = base.slots[:: max(1, len(base.slots) // SAMPLE_ROWS)][:SAMPLE_ROWS]
        self._keys: Tensor | None = None

    def update(self, rows: RowStorage, keys: Tensor, version: int) -> None:
        """Copy sampled keys that changed after ``version``; all in the first call."""
        self._slots = slots = self._slots.to(keys.device)
        if self._keys is None:
            self._keys = keys.index_select(0, slots)
        elif self._base.movement.copy is None:
            known = (rows.keys_changed_at[slots] > version) | (rows.all_keys_changed_at > version)
            self._keys[known] = keys[slots[known]]

    def is_stale(self, keys: Tensor, metric: str, tolerance: float) -> bool:
        """Return whether a sampled key differs from its copy: an unknown write."""
        if self._keys is None:
            return False
        present = keys.index_select(0, self._slots)
        if torch.equal(present, self._keys):
            return False
        if self._base.movement.copy is None:
            return True
        visible = self._slots[self._base.is_visible(self._slots.cpu()).to(keys.device)]
        if len(self._base.movement.find_moved_slots(visible, keys, metric, tolerance)):
            return True
        self._keys = present
        return False
