"""Access to a table: many readers or one writer, each of whom finds every earlier write applied and accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from softdb.errors import ReadOnlyError
from softdb.table.overwrites import (
    check_lent_buffers,
    compare_versions,
    follow_overwrites,
    is_unchanged,
    warn_of_started,
)
from softdb.table.table import Table
from softdb.transforms import is_active, suspend_transforms

__all__ = ["Access", "Preparation"]

# A read tries so many times to find no write to follow, before it keeps writers out.
READ_ATTEMPTS = 3

T = TypeVar("T")


class Preparation(Protocol):
    """What a read needs besides a table that is up to date, as a search needs its index."""

    def is_done(self) -> bool:
        """Whether nothing is to be prepared, while the table is read."""

    def run(self) -> None:
        """Prepare, while no other thread reads or writes."""


class Access:
    """Lets callers read one version of a table, or write to it.

    Args:
        table: The table.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let no other thread read or write until the block ends; follow what is written in it by others."""
        with self._table.rows.access.writing():
            self.catch_up()
            try:
                yield
            finally:
                self.catch_up()

    @contextmanager
    def exclusive(self, *, loads: bool = False) -> Iterator[None]:
        """Let no other thread read or write until the block ends.

        Args:
            loads: Whether the block replaces all rows, and may find that something else has overwritten them.
        """
        self._table.check_not_wrapped()
        with self._table.rows.access.writing(), torch.inference_mode(False):
            if loads:
                self._recover()
            else:
                self.catch_up()
            yield

    @contextmanager
    def changing(self, name: str, *, allows_meta: bool = False, loads: bool = False) -> Iterator[None]:
        """As `exclusive`, for the method ``name`` of a store, which changes rows."""
        with self.exclusive(loads=loads):
            if not allows_meta:
                self._table.check_not_meta()
            if self._table.files is not None:
                raise ReadOnlyError(
                    f"{name}: expected a store in memory, but its rows lie in the files of a snapshot, which are not "
                    "written to; call store.materialize() first"
                )
            self._table.check_own()
            yield

    def reading(self, action: Callable[[], T], preparation: Preparation | None = None) -> T:
        """Return what ``action`` finds in one version of the rows, once ``preparation`` is done."""
        if is_active():
            self._table.check_not_wrapped()
            with suspend_transforms():
                return self.reading(action, preparation)
        access = self._table.rows.access
        if access.is_read and not access.is_written:
            return action()  # within a read, whose version counts
        for _ in range(READ_ATTEMPTS):
            with access.reading():
                if self._is_current() and (preparation is None or preparation.is_done()):
                    return action()
            with access.writing():
                self._prepare(preparation)
        with access.writing():  # other threads write all the time
            self._prepare(preparation)
            return action()

    def catch_up(self) -> None:
        """Apply a write that broke off, and follow what was written in place."""
        if is_active():
            self._table.check_not_wrapped()
            with suspend_transforms():
                self.catch_up()
            return
        self._recover()
        self._follow_writes()

    def _prepare(self, preparation: Preparation | None) -> None:
        self.catch_up()
        if preparation is not None:
            preparation.run()

    def _is_current(self) -> bool:
        """Whether there is nothing to catch up with."""
        table = self._table
        return table.journal.is_empty and (is_unchanged(table.rows, table.tensors()) or table.only_lends())

    def _recover(self) -> None:
        """Apply a write that broke off."""
        if self._table.journal.recover():
            self._table.rows.layout += 1  # whatever was derived from the rows meanwhile may be wrong

    def _follow_writes(self) -> None:
        """Follow what something else has written to keys, values and the buffers of the rows, or put in their place.

        torch counts in-place writes, unless they are done through ``.data``, by numpy or by a fused optimiser: for
        those there are `SoftKVStore.touch` and the hooks of optimisers.

        Raises:
            ForeignWriteError: What is there now does not describe rows.
        """
        table, tensors = self._table, self._table.tensors()
        if is_unchanged(table.rows, tensors):
            return
        written, replaced = compare_versions(table.rows, tensors)
        check_lent_buffers(table.rows, replaced - tensors.keys())
        for name in written & tensors.keys():
            table.check_size(name, tensors[name])
        if written - tensors.keys():
            self._follow_overwrites(written - tensors.keys())
        if written & tensors.keys():
            table.rows.mark_moved(keys="keys" in written)
        if written:
            table.record_versions(replaced)

    def _follow_overwrites(self, written: frozenset[str]) -> None:
        table, rows = self._table, self._table.rows
        found = follow_overwrites(rows, written)
        if found.rows_differ:
            rows.average.remember_again(rows.ids, rows.generation, rows.id_check)
            table.clear((rows.ids < 0).nonzero().squeeze(-1))  # of what remains of the average of a row that is gone
        if len(found.started):
            warn_of_started(len(found.started))
