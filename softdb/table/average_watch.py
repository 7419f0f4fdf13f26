"""What torch's averages by place do to a copied store: slots in which they mix two rows."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.table.average_source import SourceWatch, Tensors
from softdb.table.changes import version_of
from softdb.table.slots import NO_SLOTS
from softdb.table.tenants import Tenants

__all__ = ["AverageWatch"]


class AverageWatch:
    """Finds the slots whose average mixes two rows, since the averaged store replaced one between two updates.

    torch averages tensors by place, without a call that could be followed, but lists the module's Parameters each time:
    before the next update, or before the average is exchanged with the model, `observe` is called.

    Attributes:
        is_updated: Whether an average by place has been updated here.
        mixed: The ids of mixed rows.
        started: Slots that held no row before an update, whose average began with zeros.
        source: Watches for averages of keys and values alone, whose buffers stay as they were copied.
    """

    def __init__(self, *, is_updated: bool = False) -> None:
        self.is_updated = is_updated
        self.mixed = self.started = NO_SLOTS
        self.source: SourceWatch | None = None
        self._tenants: Tenants | None = None

    @property
    def is_active(self) -> bool:
        """Whether the rows of a copy are remembered."""
        return self._tenants is not None

    def is_outdated(self, id_check: Tensor) -> bool:
        """Whether rows are remembered, and others have been copied here since."""
        return self._tenants is not None and version_of(id_check) != self._tenants.version

    def begin(self, source: Tensors, tenants: Tenants) -> None:
        """Watch a deep copy of ``source``, which holds ``tenants``."""
        if source.config.trainable:  # else its keys and values are buffers, which averages copy
            self.remember(tenants, is_updated=source.rows.average.is_updated)
        self.source = SourceWatch(source)

    def remember(self, tenants: Tenants, *, is_updated: bool = False) -> None:
        """Remember which rows are where."""
        self.is_updated = is_updated
        self.source = None
        self._tenants = tenants

    def remember_again(self, ids: Tensor, generation: Tensor, id_check: Tensor) -> None:
        """Replace what is remembered, if anything, by other buffers of the same rows."""
        if self._tenants is not None:
            self._tenants = Tenants.of(ids, generation, id_check)

    def forget(self) -> None:
        """Remember no rows: the store itself has written others."""
        self._tenants = self.source = None

    def take_started(self) -> Tensor:
        """Return the slots whose average began with zeros, and forget them."""
        started, self.started = self.started, NO_SLOTS
        return started

    def observe(self, now: Tenants) -> None:
        """Find slots in which the last update mixed what they held before with another row."""
        known = self._tenants
        if known is None:
            return
        # An average begins as a copy: nothing is mixed by the first update.
        is_first = not self.is_updated and now.version == known.version + 1
        same_size = len(known.ids) == len(now.ids)
        if not is_first and same_size:
            held, holds, other = known.ids >= 0, now.ids >= 0, known.generation != now.generation
            self.mixed = torch.cat([self.mixed, now.ids[held & holds & other].cpu()])
            self.started = torch.cat([self.started, (~held & holds).nonzero().squeeze(-1).cpu()])
        if same_size:  # a slot that has become free still holds what remains of its row
            now = now._replace(ids=torch.where((now.ids < 0) & (known.ids >= 0), known.ids, now.ids))
        self.remember(now, is_updated=True)
