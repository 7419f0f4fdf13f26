"""Copy of the ids and generations of a table's slots."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from softdb.table.changes import version_of

__all__ = ["SlotRows"]


class SlotRows(NamedTuple):
    """Copy of the ids and generations of all slots.

    Attributes:
        ids: Id of each slot's row, (capacity,), -1 at a free slot.
        generation: Generation of each slot, (capacity,).
        version: torch's version counter of the buffer ``id_check`` when the copy was made.
    """

    ids: Tensor
    generation: Tensor
    version: int

    @classmethod
    def copy_from(cls, ids: Tensor, generation: Tensor, id_check: Tensor) -> SlotRows:
        """Copy the buffers ``ids`` and ``generation``."""
        return cls(ids.clone(), generation.clone(), version_of(id_check))
