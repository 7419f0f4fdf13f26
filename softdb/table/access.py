"""Access to a table by many readers or one writer.

Before a read or a write starts, an interrupted write is finished, and writes by other code are processed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from softdb.errors import ReadOnlyError
from softdb.table.overwrites import (
    check_substituted_buffers,
    compare_versions,
    follow_overwrites,
    is_unchanged,
    warn_of_zero_start,
)
from softdb.table.table import Table
from softdb.transforms import is_active, suspend_transforms

__all__ = ["Access", "Preparation"]

# Number of times that a read tries the shared lock. If other threads have written each time, it takes the exclusive
# lock.
READ_ATTEMPTS = 3

T = TypeVar("T")


class Preparation(Protocol):
    """Work that must precede a read, such as updating the index before a search."""

    def is_done(self) -> bool:
        """Return whether there is nothing to prepare; called under the shared lock."""

    def run(self) -> None:
        """Prepare the read; called under the exclusive lock."""


class Access:
    """Synchronized access to a table for reads and writes.

    Args:
        table: The table.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the exclusive lock; process writes of other code before and after."""
        with self._table.rows.access.writing():
            self.follow_writes()
            try:
                yield
            finally:
                self.follow_writes()

    @contextmanager
    def exclusive(self, *, loads: bool = False) -> Iterator[None]:
        """Hold the exclusive lock until the block ends.

        Args:
            loads: Whether the block replaces all rows. Writes by other code are then ignored.
        """
        self._table.check_not_wrapped()
        with self._table.rows.access.writing(), torch.inference_mode(False):
            if loads:
                self._recover()
            else:
                self.follow_writes()
            yield

    @contextmanager
    def changing(self, name: str, *, allows_meta: bool = False, loads: bool = False) -> Iterator[None]:
        """Hold the exclusive lock for a method of a store that changes rows.

        Args:
            name: The name of the method, for error messages.
            allows_meta: Whether the tensors may be on the meta device.
            loads: As for `exclusive`.
        """
        with self.exclusive(loads=loads):
            if not allows_meta:
                self._table.check_not_meta()
            if not loads:
                self._table.rows.pending_checks.raise_failed()
            if self._table.files is not None:
                raise ReadOnlyError(
                    f"{name}: expected a store in memory, got one whose rows are memory-mapped snapshot files, "
                    "which are read-only; call store.materialize() first"
                )
            self._table.check_not_substituted()
            yield

    def reading(self, action: Callable[[], T], preparation: Preparation | None = None) -> T:
        """Run ``action`` on one version of the rows and return its result.

        Args:
            action: The function to run under the lock.
            preparation: Work that must be done before; None for nothing.
        """
        if is_active():
            self._table.check_not_wrapped()
            with suspend_transforms():
                return self.reading(action, preparation)
        access = self._table.rows.access
        if access.is_read and not access.is_written:
            return action()  # A nested read uses the version of the outer one.
        for _ in range(READ_ATTEMPTS):
            with access.reading():
                if self._is_current() and (preparation is None or preparation.is_done()):
                    return action()
            with access.writing():
                self._prepare(preparation)
        with access.writing():  # Other threads have written during each attempt.
            self._prepare(preparation)
            return action()

    def follow_writes(self) -> None:
        """Finish an interrupted write, and process writes to tensors by other code."""
        if is_active():
            self._table.check_not_wrapped()
            with suspend_transforms():
                self.follow_writes()
            return
        self._recover()
        self._follow_tensor_writes()

    def _prepare(self, preparation: Preparation | None) -> None:
        self.follow_writes()
        if preparation is not None:
            preparation.run()

    def _is_current(self) -> bool:
        """Return whether no write remains to be applied or processed."""
        table = self._table
        return table.journal.is_empty and (is_unchanged(table.rows, table.tensors()) or table.has_only_substitutes())

    def _recover(self) -> None:
        """Finish an interrupted write."""
        if self._table.journal.recover():
            self._table.rows.layout += 1  # Data derived from a partly applied write may be wrong.

    def _follow_tensor_writes(self) -> None:
        """Process writes by other code to keys, values and row buffers.

        torch's version counters reveal in-place writes, but not writes through ``.data``, by NumPy or by fused
        optimizers. `SoftKVStore.touch` and the optimizer hooks report such writes.

        Raises:
            ForeignWriteError: The buffers do not describe valid rows.
        """
        table, tensors = self._table, self._table.tensors()
        if is_unchanged(table.rows, tensors):
            return
        written, replaced = compare_versions(table.rows, tensors)
        check_substituted_buffers(table.rows, replaced - tensors.keys())
        for name in written & tensors.keys():
            table.check_size(name, tensors[name])
        if written - tensors.keys():
            self._follow_overwrites(written - tensors.keys())
        if written & tensors.keys():
            table.rows.mark_updated(keys="keys" in written)
        if written:
            table.record_versions(replaced)

    def _follow_overwrites(self, written: frozenset[str]) -> None:
        table, rows = self._table, self._table.rows
        found = follow_overwrites(rows, written)
        if found.rows_differ:
            rows.average.refresh_recorded(rows.ids, rows.generation, rows.id_check)
            table.clear((rows.ids < 0).nonzero().squeeze(-1))  # The averages of removed rows must not remain.
        if len(found.zero_started):
            warn_of_zero_start(len(found.zero_started))
