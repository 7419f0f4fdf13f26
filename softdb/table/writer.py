"""`Writer`: the methods of a store that write rows.

A method checks its arguments and makes a `WriteBatch`. A `WritePlan` holds the resulting slots and counters. The
journal holds the plan until it has been applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from softdb._checks import Ids, check_finite, check_float_tensor, check_ids, check_positive, check_vector, list_ids
from softdb.errors import ArgumentError, DuplicateIdError, ShapeError
from softdb.table.access import Access
from softdb.table.compaction import prepare_compaction
from softdb.table.fields import check_fields
from softdb.table.journal import RESIZE_OUTCOME, WRITE_OUTCOME, Growth, WriteBatch
from softdb.table.slots import NO_SLOTS, slots_to_index
from softdb.table.table import Table

__all__ = ["Fields", "Writer", "check_rows"]

Fields = Mapping[str, Tensor | npt.NDArray[Any] | Sequence[int] | int]

# Largest id, so that the next id still fits int64.
MAX_ID = 2**63 - 2


class Writer:
    """Implementation of the methods of `softdb.SoftKVStore` that write rows.

    Args:
        table: The table.
        access: The access to the table, with its locks.
    """

    def __init__(self, table: Table, access: Access) -> None:
        self._table, self._access = table, access

    def add(self, keys: Tensor, values: Tensor, ids: Ids | None, fields: Fields | None) -> Tensor:
        """Append rows; return their ids."""
        with self._access.changing("add"):
            rows = self._table.rows
            stored = self._check_rows(keys, values)
            if ids is None:
                new = self._new_ids(len(keys))
            else:
                new = check_ids("ids", ids)
                check_count(new, len(keys))
                self._check_new(new)
            columns = check_fields(rows.fields, fields, len(keys), complete=True)
            added = new.to(
                self._table.keys.device
            )  # Copy before the write: an error here after the write would hide that the rows exist.
            removed_slots, growth = self._make_room(new)
            self._write(WriteBatch(new, NO_SLOTS, removed_slots, *stored, columns), growth)
            return added

    def put(self, ids: Ids, keys: Tensor, values: Tensor, fields: Fields | None) -> None:
        """Insert or replace rows."""
        with self._access.changing("put"):
            rows = self._table.rows
            given = check_ids("ids", ids)
            stored_keys, stored_values = self._check_rows(keys, values)
            check_count(given, len(keys))
            columns = check_fields(rows.fields, fields, len(given), complete=True)
            slots = rows.slots.find(given)
            self._check_new(given[slots < 0])
            # A batch holds replaced rows first, then new ones.
            order = (slots < 0).to(torch.int8).argsort(stable=True)
            slots, given = slots[order], given[order]
            index = slots_to_index(order.to(stored_keys.device))
            replaced = slots[slots >= 0]
            new = given[len(replaced) :]
            removed_slots, growth = self._make_room(new, replaced)
            columns = {name: column if column.dim() == 0 else column[order] for name, column in columns.items()}
            self._write(
                WriteBatch(new, replaced, removed_slots, stored_keys[index], stored_values[index], columns), growth
            )

    def update(self, ids: Ids, keys: Tensor | None, values: Tensor | None, fields: Fields | None) -> None:
        """Change keys, values or fields of existing rows."""
        with self._access.changing("update"):
            given = check_ids("ids", ids)
            stored_keys = None if keys is None else self._check_table("keys", keys)
            stored_values = None if values is None else self._check_table("values", values)
            for table in (stored_keys, stored_values):
                if table is not None:
                    check_count(given, len(table))
            columns = check_fields(self._table.rows.fields, fields, len(given), complete=False)
            slots = self._table.rows.slots.slots_of("ids", given)
            if keys is None and values is None and not columns:
                return
            self._write(WriteBatch(slots=slots, keys=stored_keys, values=stored_values, fields=columns))

    def revive(self, ids: Ids, keys: Tensor, values: Tensor) -> None:
        """Replace keys and values of unused rows, and start a new generation of them."""
        with self._access.changing("revive"):
            given = check_ids("ids", ids)
            stored_keys, stored_values = self._check_rows(keys, values)
            check_count(given, len(keys))
            slots = self._table.rows.slots.slots_of("ids", given)
            self._write(WriteBatch(slots=slots, keys=stored_keys, values=stored_values, new_generation=True))

    def delete(self, ids: Ids | None, find_ids: Callable[[], Tensor] | None) -> None:
        """Remove the rows with the given ids, or with the ids that a function returns."""
        with self._access.changing("delete"):
            if (ids is None) == (find_ids is None):
                both = "both" if find_ids is not None else "neither"
                raise ArgumentError(f"ids, where: expected one of them, got {both}; to delete all rows, call clear()")
            given = check_ids("ids", ids, scalar=True) if find_ids is None else find_ids()
            self._write(WriteBatch(removed_slots=self._table.rows.slots.slots_of("ids", given)))

    def clear(self) -> None:
        """Remove all rows."""
        with self._access.changing("clear"):
            self._write(WriteBatch(removed_slots=self._table.rows.live_slots().cpu()))

    def touch(self, ids: Ids) -> None:
        """Record that the caller has written to the tensors of rows."""
        with self._access.changing("touch"):
            given = check_ids("ids", ids, scalar=True, repeats=True)
            check_vector("ids", given)
            slots = self._table.rows.slots.slots_of("ids", given).unique()
            self._table.journal.commit(lambda: self._table.rows.mark_written(slots), WRITE_OUTCOME)

    def reserve(self, n: int) -> None:
        """Allocate storage for ``n`` rows in total."""
        with self._access.changing("reserve", allows_meta=True):
            growth = self._table.prepare_growth(check_positive("n", n), exactly=True)
            if growth is not None:
                self._table.journal.commit(lambda: self._table.install(growth), RESIZE_OUTCOME)

    def compact(self) -> None:
        """Move the rows to the lowest slots, and shrink the storage to them."""
        with self._access.changing("compact"):
            compaction = prepare_compaction(self._table)
            if compaction is not None:
                self._table.journal.commit(compaction, RESIZE_OUTCOME)

    def materialize(self) -> None:
        """Copy memory-mapped rows of a snapshot into memory."""
        table = self._table
        with self._access.exclusive():
            if table.files is None:
                return
            growth = table.prepare_resize(table.config.capacity or table.rows.capacity)
            self._table.journal.commit(lambda: table.install(growth), RESIZE_OUTCOME)
            for name, tensor in table.tensors().items():
                tensor.requires_grad_(table.config.trainable and name not in table.files.frozen)
            table.files = None
            table.record_versions()

    # -- steps -----------------------------------------------------------------------------------------------

    def _write(self, batch: WriteBatch, growth: Growth | None = None) -> None:
        """Plan a batch and apply the plan through the journal.

        Growth is committed first, as a separate write: if it is interrupted, no rows are inserted.
        """
        if growth is not None:
            self._table.journal.commit(lambda: self._table.install(growth), RESIZE_OUTCOME)
        plan = self._table.rows.plan(batch)
        self._table.keep_rows(plan)
        self._table.journal.commit(lambda: self._table.apply(plan), WRITE_OUTCOME)

    def _make_room(self, new: Tensor, replaced: Tensor = NO_SLOTS) -> tuple[Tensor, Growth | None]:
        """Make room for new rows: choose rows to evict, or allocate larger storage.

        Args:
            new: The ids of the new rows.
            replaced: Slots that the same call writes to, which are not evicted.

        Returns:
            The slots to evict, and the larger tensors or None.
        """
        rows, config = self._table.rows, self._table.config
        count, total = len(new), len(new) + len(replaced)
        if config.capacity is not None and total > config.capacity:
            raise ArgumentError(
                f"keys: expected at most {config.capacity} rows, the store's capacity, got {total}; write fewer rows "
                "at a time, or make the store with a larger capacity"
            )
        rows.slots.widen(new, len(rows))
        needed = rows.used + max(0, count - len(rows.free))
        if rows.clock.column is None or needed <= rows.capacity:
            return NO_SLOTS, self._table.prepare_growth(needed)
        readings = getattr(rows, rows.clock.column)[: rows.used]
        excess = needed - rows.capacity
        return rows.clock.rows_to_evict(readings, rows.ids[: rows.used], excess, replaced).cpu(), None

    def _new_ids(self, count: int) -> Tensor:
        """Return the next ``count`` ids; they are taken when the rows are inserted."""
        first = self._table.rows.first_new_id
        if first + count - 1 > MAX_ID:
            raise ArgumentError(f"ids: expected unused ids up to {MAX_ID}, got none; pass ids of deleted rows")
        return torch.arange(first, first + count, device="cpu")

    def _check_new(self, ids: Tensor) -> None:
        """Raise if one of ``ids`` exists already or is too large."""
        taken = ids[self._table.rows.slots.find(ids) >= 0]
        if len(taken):
            raise DuplicateIdError(f"ids: expected ids that are not in the store, got existing {list_ids(taken)}")
        if len(ids) and int(ids.max()) > MAX_ID:
            raise ArgumentError(f"ids: expected ids of at most {MAX_ID}, got {int(ids.max())}")

    def _check_rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored_keys, stored_values = self._check_table("keys", keys), self._check_table("values", values)
        if len(keys) != len(values):
            raise ShapeError(f"values: expected {len(keys)} rows, one for each key, got {len(values)}")
        return stored_keys, stored_values

    def _check_table(self, name: str, given: Tensor) -> Tensor:
        """Check keys or values and convert them to the dtype and device of the store.

        Rows on the CPU are copied to the device of any store. The copy of pinned memory does not wait for the device,
        but the check of the numbers does, so the caller may overwrite the memory after the write.
        """
        tensors = self._table.tensors()
        table = tensors[name]
        is_copied = isinstance(given, Tensor) and given.device.type == "cpu" and table.device.type != "meta"
        check_rows(name, given, table.shape[-1], None if is_copied else table.device)
        stored = given.detach().to(table.device, non_blocking=True).to(table.dtype)
        check_finite(name, stored)
        own = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
        return stored.clone() if stored.untyped_storage().data_ptr() in own else stored


def check_rows(name: str, given: Tensor, width: int | None, device: torch.device | None) -> None:
    """Raise unless ``given`` can be keys or values of rows, except for its numbers."""
    for_integers = ", or store integers in fields=..." if name == "values" else ""
    check_float_tensor(name, given, (None, width), device, for_integers=for_integers)


def check_count(ids: Tensor, count: int) -> None:
    """Raise unless there are ``count`` ids."""
    if len(ids) != count:
        raise ShapeError(f"ids: expected {count} ids, one for each row, got {len(ids)}")
