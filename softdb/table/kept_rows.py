"""Copies of rows that are overwritten before the backward of a read.

The backward of an exact read computes the scores again, from the rows as they were at the read. A read of rows without
gradient holds `RowsAtRead`. Before a write changes a row, it copies the row (`RowCopies`) for every open read that used
it. Backward takes the copies in place of the changed rows, and all other rows from the table.

A copy holds the contents that a row had between two changes. It is valid only for reads made between these changes. If
a change bypassed the store, there is no copy, and backward raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from softdb._checks import list_ids
from softdb.errors import StaleReadError
from softdb.table.fields import RowView
from softdb.table.storage import RowStorage

__all__ = ["RestoredView", "RowCopies", "RowsAtRead", "keep_rows"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RowCopies:
    """Copies of rows.

    Attributes:
        slots: Slots of the rows, (m,) ascending.
        since: Version of the last change of each row before it was copied, (m,).
        tables: Keys and values by name, (m, width).
        columns: Ids and fields by name, (m,), as in `softdb.table.storage.RowStorage.view`.
    """

    slots: Tensor
    since: Tensor
    tables: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]

    @classmethod
    def of(cls, rows: RowStorage, tables: Mapping[str, Tensor], slots: Tensor) -> RowCopies:
        """Copy the rows at ``slots``, ascending."""
        columns = {name: column.clone() for name, column in rows.view(slots).items()}
        copies = {name: table.detach()[slots.to(table.device)] for name, table in tables.items()}
        return cls(slots, find_last_change(rows, slots), copies, columns)

    @classmethod
    def gather(cls, parts: Sequence[RowCopies], places: Tensor) -> RowCopies:
        """Gather copies at ``places`` in the concatenation of ``parts``."""

        def gather(columns: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(columns))[places.to(columns[0].device)]

        return cls(
            gather([part.slots for part in parts]),
            gather([part.since for part in parts]),
            {name: gather([part.tables[name] for part in parts]) for name in parts[0].tables},
            {name: gather([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    def __len__(self) -> int:
        return len(self.slots)

    def restore_rows(self, name: str, rows: Tensor, slots: slice | Tensor) -> Tensor:  # (..., C, w)
        """Return keys or values of a block, with the copies in place of the changed rows.

        Args:
            name: "keys" or "values". A name without copies leaves the rows as they are.
            rows: Rows of the block, which may have fewer columns than the copies. They are not changed.
            slots: Slots of the block, ascending.
        """
        if name not in self.tables:
            return rows
        columns, places = self._find(slots)
        if len(columns) == 0:
            return rows
        copies = self.tables[name][places.to(rows.device), : rows.shape[-1]]
        return rows.index_copy(-2, columns.to(rows.device), copies.expand(*rows.shape[:-2], *copies.shape))

    def restore_columns(self, view: Mapping[str, Tensor], slots: slice | Tensor) -> Mapping[str, Tensor]:
        """Return ids and fields of a block, with the copies in place of the changed rows.

        Args:
            view: Ids and fields of the block by name, (C,).
            slots: Slots of the block, ascending.
        """
        columns, places = self._find(slots)
        return RowView({name: view[name].index_copy(0, columns, self.columns[name][places]) for name in view})

    def _find(self, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Find the columns of a block that have copies, and the places of the copies."""
        if isinstance(slots, slice):
            first, last = torch.searchsorted(self.slots, self.slots.new_tensor([slots.start, slots.stop])).tolist()
            return self.slots[first:last] - slots.start, torch.arange(first, last, device=self.slots.device)
        columns = torch.isin(slots, self.slots).nonzero().squeeze(-1)
        return columns, torch.searchsorted(self.slots, slots[columns])


class RowsAtRead:
    """Rows that a read used, as they were at its version.

    Args:
        rows: The rows of the table.
        tables: Keys and values that are read, by name; empty if they are not the table's own.
        keeps: Whether writes copy the rows that they overwrite.

    Attributes:
        access: The lock of the rows.
        keeps: As the argument.
        version: The version of the rows.
        used: Slots that the read may have used: a bool mask over the first slots, a tensor of slots (-1 is padding), or
            None for every slot below ``first``.
        copies: Copies of the rows that the store has overwritten since.
        is_expired: Whether the copies were dropped to save memory. No further copies are made for this read.
    """

    def __init__(self, rows: RowStorage, tables: Mapping[str, Tensor], *, keeps: bool) -> None:
        self._rows, self.access, self.keeps = rows, rows.access, keeps
        self._storages = {name: table.untyped_storage().data_ptr() for name, table in tables.items()} if keeps else {}
        self.version, self._first, self.used = rows.version, rows.used, rows.live_mask()
        self.copies: list[RowCopies] = []
        self.is_expired = False

    def find_used(self, slots: Tensor) -> Tensor:
        """Return which ``slots`` the read may have used, as a bool mask."""
        seen = slots < self._first
        if self.used is None:
            return seen
        if self.used.dtype != torch.bool:
            return seen & torch.isin(slots, self.used)
        if len(self.used):
            seen = seen & self.used[slots.clamp(max=len(self.used) - 1)]
        return seen

    def find_changed(self) -> Tensor:
        """Return the used slots that have changed since the read, ascending."""
        if self._rows.version == self.version:
            return torch.empty(0, dtype=torch.int64, device=self._rows.ids.device)
        changed = self._rows.changed_since(self.version)
        return changed[self.find_used(changed)]

    def check(self) -> None:
        """Raise `StaleReadError` if a row has changed without a copy."""
        self._locate_copies(self.find_changed())

    def compute(self, function: Callable[[RowCopies | None], T]) -> T:
        """Call ``function`` with the copies of all changed rows, or None.

        The copies are in ascending order of slots. If another thread overwrites rows while the function runs, it is
        called again with the new copies.

        Args:
            function: A function without side effects.

        Raises:
            StaleReadError: A row has changed without a copy.
        """
        while True:
            changed = self.find_changed()
            places, parts = self._locate_copies(changed)
            copies = RowCopies.gather(parts, places) if len(changed) else None
            try:
                result = function(copies)
            except StaleReadError:
                if len(self.find_changed()) == len(changed):
                    raise
                continue
            if len(self.find_changed()) == len(changed):  # Changed rows never become unchanged.
                return result

    def view(self, copies: RowCopies) -> RestoredView:
        """Return a view of ids and fields with ``copies`` in place of the changed rows."""
        return RestoredView(self._rows, copies)

    def select_own(self, copies: RowCopies, **tables: Tensor) -> RowCopies:
        """Return ``copies`` for the tables whose memory the read found in the store.

        Other tables are copies that no write changes. For example, a read sets hidden rows with NaN to zero in a copy
        of the keys.
        """
        own = {
            n: copies.tables[n] for n, t in tables.items() if t.untyped_storage().data_ptr() == self._storages.get(n)
        }
        return replace(copies, tables=own)

    def expire(self) -> None:
        """Drop all copies, and make no more."""
        self.copies, self.is_expired = [], True

    def _locate_copies(self, changed: Tensor) -> tuple[Tensor, Sequence[RowCopies]]:
        """Return the places of the copies of changed slots, and the copies."""
        parts = self.copies
        if len(changed) == 0:
            return changed, parts
        if not parts:
            self._raise_stale(changed)
        slots, since = torch.cat([part.slots for part in parts]), torch.cat([part.since for part in parts])
        valid = (since <= self.version).nonzero().squeeze(-1)
        ordered, order = slots[valid].sort()
        places = torch.searchsorted(ordered, changed).clamp_(max=max(0, len(ordered) - 1))
        found = ordered[places] == changed if len(ordered) else torch.zeros_like(changed, dtype=torch.bool)
        if not bool(found.all()):
            self._raise_stale(changed[~found])
        return valid[order[places]], parts

    def _raise_stale(self, slots: Tensor) -> NoReturn:
        if self.is_expired:
            raise StaleReadError(
                "backward: expected the store to keep the overwritten rows for all open reads, got more than "
                f"{self._rows.capacity} rows for all of them, so those of this read (slots {list_ids(slots)}) were "
                "dropped; call backward() earlier, or delete reads and losses that need no backward"
            )
        raise StaleReadError(
            f"backward: expected the rows that this read used to be unchanged, got {len(slots)} changed or "
            f"deleted rows (slots {list_ids(slots)}), so the gradients would be wrong; call backward() before "
            "writing to the store or stepping an optimizer, or read again"
        )


@dataclass(frozen=True)
class RestoredView:
    """View of ids and fields, with copies in place of the changed rows."""

    rows: RowStorage
    copies: RowCopies

    def view(self, slots: slice | Tensor) -> Mapping[str, Tensor]:
        """Return ids and fields of the rows at ascending ``slots``, by name."""
        return self.copies.restore_columns(self.rows.view(slots), slots)


def find_last_change(rows: RowStorage, slots: Tensor) -> Tensor:
    """Return the version of the last change of each row at ``slots``."""
    return rows.changed_at[slots].clamp(min=rows.all_changed_at)


def keep_rows(reads: Sequence[RowsAtRead], rows: RowStorage, tables: Mapping[str, Tensor], changing: Tensor) -> None:
    """Copy the rows that a write will change for the reads that used them.

    All reads together hold copies of at most ``rows.capacity`` rows. Beyond that the oldest reads expire.

    Args:
        reads: The open reads, the oldest first.
        rows: The rows of the table.
        tables: Keys and values by name.
        changing: The slots that the write will change.
    """
    slots = changing.to(rows.ids.device).unique()
    slots = slots[slots < rows.used]  # Other slots held no row yet.
    since = find_last_change(rows, slots)
    needs = {read: read.find_used(slots) & (since <= read.version) for read in reads if not read.is_expired}
    while needs:
        needed = torch.stack(list(needs.values())).any(0)
        held = {id(part): len(part) for read in needs for part in read.copies}
        if sum(held.values()) + int(needed.sum()) <= rows.capacity:
            break
        oldest = next(iter(needs))
        oldest.expire()
        del needs[oldest]
    if not needs or not bool(needed.any()):
        return
    copies = RowCopies.of(rows, tables, slots[needed])
    for read, own in needs.items():
        if bool(own.any()):
            read.copies.append(copies)
