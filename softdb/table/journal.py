"""Write batches, write plans, and the journal that makes writes atomic.

A `WriteBatch` holds the checked arguments of a call. A `WritePlan` holds the slots and counters after the write, so
that it can be applied repeatedly with the same result. The `Journal` applies a plan again after an interruption: at
once, or at the next use of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from softdb.errors import UnfinishedWriteError
from softdb.table.slots import NO_SLOTS, FreeSlots

__all__ = ["RESIZE_OUTCOME", "WRITE_OUTCOME", "Growth", "Journal", "Outcome", "WriteBatch", "WritePlan"]


@dataclass(frozen=True, eq=False)
class WriteBatch:
    """Checked arguments of a write.

    Attributes:
        ids: Ids of the rows to insert, (m,).
        slots: Slots of the rows to overwrite, (n,).
        removed_slots: Slots of the rows to remove.
        keys: Keys of the overwritten rows, then of the inserted ones, (n + m, key_dim); None to keep them.
        values: Values in the same order, (n + m, value_dim); None to keep them.
        fields: Field columns in the same order, by name.
        new_generation: Whether the overwritten rows get a new generation, as new rows do.
    """

    ids: Tensor = NO_SLOTS
    slots: Tensor = NO_SLOTS
    removed_slots: Tensor = NO_SLOTS
    keys: Tensor | None = None
    values: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    new_generation: bool = False


@dataclass(frozen=True, eq=False)
class Growth:
    """Resized tensors of a table, by name, which are not yet installed."""

    buffers: dict[str, Tensor]
    tables: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class WritePlan:
    """Result of a batch. All counters have their values after the write.

    Attributes:
        batch: The batch.
        inserted_slots: Slots of the inserted rows, (m,).
        written_slots: Slots of the overwritten rows, then of the inserted ones, (n + m,).
        removed_ids: Ids of the removed rows.
        reset_slots: Slots that get a new generation.
        generation: Generations of ``reset_slots``.
        changed_slots: All slots that change.
        keys_change: Whether keys change, or rows are inserted or removed.
        free: The free slots.
        used_at: Clock reading of the written rows; None if uses are not recorded.
        added_at: Clock readings of the inserted rows, (m,); None if additions are not recorded.
        clock: Next reading of the eviction clock.
        next_id, id_hash, writes, version: As in `softdb.table.storage.RowStorage`.
    """

    batch: WriteBatch
    inserted_slots: Tensor
    written_slots: Tensor
    removed_ids: Tensor
    reset_slots: Tensor
    generation: Tensor
    changed_slots: Tensor
    keys_change: bool
    free: FreeSlots
    used_at: int | None
    added_at: Tensor | None
    clock: int
    next_id: int
    id_hash: int
    writes: int
    version: int

    @property
    def freed_slots(self) -> Tensor:
        """Removed slots in which the write inserts no row."""
        removed = self.batch.removed_slots
        return removed[~torch.isin(removed, self.inserted_slots)] if len(self.inserted_slots) else removed


class Outcome(NamedTuple):
    """Messages about an interrupted write.

    Attributes:
        completed: Message after the write was applied again.
        pending: Message while the write remains in the journal.
    """

    completed: str
    pending: str


WRITE_OUTCOME = Outcome(
    "the write has been completed",
    "the journal keeps the write, and the next use of the store completes it; do not repeat the call, and until then "
    "do not modify the tensors that were passed to it",
)
RESIZE_OUTCOME = Outcome(
    "the storage has been resized, and nothing else was written",
    "the next use of the store resizes the storage; nothing else was written",
)


class Journal:
    """Holder of the write in progress, until it has been applied."""

    def __init__(self) -> None:
        self._pending: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[type[Journal], tuple[()]]:
        return Journal, ()  # A copy starts with no pending write.

    @property
    def is_empty(self) -> bool:
        """Whether every write has been applied."""
        return self._pending is None

    def recover(self) -> bool:
        """Finish an interrupted write; return whether there was one."""
        if self._pending is None:
            return False
        self._pending()
        self._pending = None
        return True

    def commit(self, apply: Callable[[], None], outcome: Outcome) -> None:
        """Apply a write; if it is interrupted, apply it once more from the start.

        Args:
            apply: The function that applies the write; running it again gives the same result.
            outcome: The messages for an interruption.

        Raises:
            UnfinishedWriteError: The write failed twice; the next use of the store finishes it.
        """
        try:
            self._pending = apply
            self.recover()
        except BaseException as error:
            self._apply_again(error, outcome)

    def _apply_again(self, error: BaseException, outcome: Outcome) -> None:
        """Finish the write that ``error`` interrupted; raise an interrupt again."""
        message = outcome.completed
        try:
            self.recover()
        except BaseException as again:
            message = outcome.pending
            if not isinstance(again, Exception):
                error = again
            elif outcome is RESIZE_OUTCOME and isinstance(error, Exception):
                raise error from again  # The storage is resized at the next use, which callers do not notice.
            elif isinstance(error, Exception):
                raise UnfinishedWriteError(f"write: expected it to complete, got {error!r}; {message}") from error
        if not isinstance(error, Exception):
            error.args = error.args or (message,)
            raise error
