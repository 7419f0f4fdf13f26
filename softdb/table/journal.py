"""Writes: what a call asks for, what that does to the table, and the journal that keeps it until it is done.

A `WriteBatch` is what a caller passed, checked. A `WritePlan` says what becomes of it, slot by slot and number by
number, so that it may be applied again from the start: by the `Journal`, at once where something breaks off, or at the
next use of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from softdb.errors import UnfinishedWriteError
from softdb.table.slots import NO_SLOTS, FreeSlots

__all__ = ["RESIZED", "WRITTEN", "Growth", "Journal", "Outcome", "WriteBatch", "WritePlan"]


@dataclass(frozen=True, eq=False)
class WriteBatch:
    """What one call writes.

    Attributes:
        ids: Of the rows that come, (m,).
        slots: Of rows that are there, and are written, (n,).
        leaving: The slots of rows that go.
        keys: Of the rows at ``slots``, and of those that come, (n + m, key_dim); None to leave them.
        values: The same, (n + m, value_dim).
        fields: Columns of them.
        afresh: Whether the rows at ``slots`` begin as other rows.
    """

    ids: Tensor = NO_SLOTS
    slots: Tensor = NO_SLOTS
    leaving: Tensor = NO_SLOTS
    keys: Tensor | None = None
    values: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    afresh: bool = False


@dataclass(frozen=True, eq=False)
class Growth:
    """Tensors with room for more rows, or fewer."""

    buffers: dict[str, Tensor]
    tables: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class WritePlan:
    """What a batch does to the table. Every number is the one that holds afterwards.

    Attributes:
        batch: What is written.
        placed: The slots of the rows that come.
        written: The slots of the rows that keys, values and fields are for.
        gone: The ids of the rows that go.
        fresh: Slots that hold another row than before.
        generation: Of those slots.
        changed: All slots that change.
        keys_change: Whether their keys do, or whether they hold a row.
        free: The free slots.
        used_at: The eviction clock of the written rows; None where uses are not recorded.
        added_at: The eviction clock of the rows that come, each its own; None where additions are not recorded.
        clock: The eviction clock afterwards.
        next_id, id_hash, writes, version: As `softdb.table.storage.RowStorage` keeps them.
    """

    batch: WriteBatch
    placed: Tensor
    written: Tensor
    gone: Tensor
    fresh: Tensor
    generation: Tensor
    changed: Tensor
    keys_change: bool
    free: FreeSlots
    used_at: int | None
    added_at: Tensor | None
    clock: int
    next_id: int
    id_hash: int
    writes: int
    version: int


class Outcome(NamedTuple):
    """What has come of a write that broke off, in words: ``done`` if it was applied again, else ``pending``."""

    done: str
    pending: str


WRITTEN = Outcome(
    "the write has been completed",
    "it is recorded: the next use of the store completes it, so do not repeat the call, and until then leave the "
    "tensors that were passed to it as they are",
)
RESIZED = Outcome(
    "the storage has been resized, and nothing else was written",
    "the next use of the store resizes the storage; nothing else was written",
)


class Journal:
    """Keeps a write from the moment when it is decided until it has been applied."""

    def __init__(self) -> None:
        self._pending: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[type[Journal], tuple[()]]:
        return Journal, ()  # a copy has nothing to apply

    @property
    def is_empty(self) -> bool:
        """Whether every write has been applied."""
        return self._pending is None

    def recover(self) -> bool:
        """Apply a write that broke off; return whether there was one."""
        if self._pending is None:
            return False
        self._pending()
        self._pending = None
        return True

    def commit(self, apply: Callable[[], None], outcome: Outcome) -> None:
        """Apply a write.

        Args:
            apply: What is done again from the start where an interrupt or a shortage of memory breaks it off.
            outcome: What to say then.

        Raises:
            UnfinishedWriteError: It broke off twice, and waits for the next use of the store.
        """
        try:
            self._pending = apply
            self.recover()
        except BaseException as error:
            self._apply_again(error, outcome)

    def _apply_again(self, error: BaseException, outcome: Outcome) -> None:
        """Apply the write that ``error`` broke off; an interrupt is raised again when that is done."""
        said = outcome.done
        try:
            self.recover()
        except BaseException as again:
            said = outcome.pending
            if not isinstance(again, Exception):
                error = again
            elif outcome is RESIZED and isinstance(error, Exception):
                raise error from again  # a storage that grows at the next use is nothing that a caller could notice
            elif isinstance(error, Exception):
                raise UnfinishedWriteError(f"expected to write at once, got {error!r}; {said}") from error
        if not isinstance(error, Exception):
            error.args = error.args or (said,)
            raise error
