"""Detection of slot-wise averages that mix two rows in a copied store."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.table.average_source import SourceWatch, Tensors
from softdb.table.changes import version_of
from softdb.table.slot_rows import SlotRows
from softdb.table.slots import NO_SLOTS

__all__ = ["AverageWatch"]


class AverageWatch:
    """Detector of slots whose average mixes two rows.

    The average of a slot mixes two rows if the averaged store has put another row into the slot between two updates.
    torch averages tensors slot by slot and does not call the store. However, it lists the module's Parameters before
    each update, and before the average is exchanged with the model. `observe` is called at these times.

    Attributes:
        is_updated: Whether a slot-wise average has been updated in this store.
        mixed: Ids of mixed rows.
        zero_started: Slots that held no row before an update. Their averages started from zero.
        source: Detector of averages of keys and values only, which leave the row buffers of the copy unchanged.
    """

    def __init__(self, *, is_updated: bool = False) -> None:
        self.is_updated = is_updated
        self.mixed = self.zero_started = NO_SLOTS
        self.source: SourceWatch | None = None
        self._recorded: SlotRows | None = None

    @property
    def is_active(self) -> bool:
        """Whether the rows of a copy are recorded."""
        return self._recorded is not None

    def is_outdated(self, id_check: Tensor) -> bool:
        """Return whether other row buffers were copied here since the last recording."""
        return self._recorded is not None and version_of(id_check) != self._recorded.version

    def begin(self, source: Tensors, slot_rows: SlotRows) -> None:
        """Start to watch a deep copy of ``source``; the copy holds ``slot_rows``."""
        if source.config.trainable:  # Otherwise keys and values are buffers, which averages copy.
            self.record(slot_rows, is_updated=source.rows.average.is_updated)
        self.source = SourceWatch(source)

    def record(self, slot_rows: SlotRows, *, is_updated: bool = False) -> None:
        """Record which row each slot holds."""
        self.is_updated = is_updated
        self.source = None
        self._recorded = slot_rows

    def refresh_recorded(self, ids: Tensor, generation: Tensor, id_check: Tensor) -> None:
        """Record the rows again after buffers were replaced, if any are recorded."""
        if self._recorded is not None:
            self._recorded = SlotRows.copy_from(ids, generation, id_check)

    def reset(self) -> None:
        """Drop the recorded rows, since the store itself has written rows."""
        self._recorded = self.source = None

    def pop_zero_started(self) -> Tensor:
        """Return the slots whose average started from zero, and clear the list."""
        zero_started, self.zero_started = self.zero_started, NO_SLOTS
        return zero_started

    def observe(self, now: SlotRows, *, has_whole_ids: bool) -> None:
        """Find slots in which the last update mixed two rows.

        Args:
            now: The rows that the slots hold.
            has_whole_ids: Whether the ids are those of a store, not an average of ids.
        """
        known = self._recorded
        if known is None:
            return
        # An average starts as a copy, so the first update mixes no rows.
        is_first = not self.is_updated and now.version == known.version + 1
        same_size = len(known.ids) == len(now.ids)
        if not is_first and same_size:
            held, holds = known.ids >= 0, now.ids >= 0
            other = known.generation != now.generation
            if has_whole_ids:  # Compaction may move a row of the same generation to the slot.
                other |= known.ids != now.ids
            self.mixed = torch.cat([self.mixed, now.ids[held & holds & other].cpu()])
            self.zero_started = torch.cat([self.zero_started, (~held & holds).nonzero().squeeze(-1).cpu()])
        if same_size:  # The average of a slot that became free still contains its last row.
            now = now._replace(ids=torch.where((now.ids < 0) & (known.ids >= 0), known.ids, now.ids))
        self.record(now, is_updated=True)
