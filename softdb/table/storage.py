"""`RowStorage`: which row lies in which slot, and what changed when.

A *slot* is a row's place in the tensors. Slots never move, since optimiser state and gradients are laid out by slot;
a deleted row leaves a hole that a later row fills, lowest slot first. Ids are the user's names for rows: an int64
each, assigned in order and never twice.

`RowStorage` calls nothing that depends on it. An index or an open read keeps the ``version`` that it saw and asks what
changed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdb.errors import ForeignWriteError
from softdb.table.average_watch import AverageWatch
from softdb.table.changes import ChangeLog
from softdb.table.eviction import CLOCK_COLUMNS, EvictionClock
from softdb.table.fields import RowView, check_field_names
from softdb.table.id_check import CHECK_SIZE, hash_rows, id_check_of
from softdb.table.journal import WriteBatch, WritePlan
from softdb.table.locks import SharedLock
from softdb.table.slots import NO_SLOTS, FreeSlots, SlotTable
from softdb.table.tenants import Tenants
from softdb.table.usage import keep_sum_dtype, reset_counters
from softdb.table.versions import RecordedVersions

__all__ = ["CHANGE_COLUMNS", "RowStorage"]

# The buffers that say at which version a slot changed: of no state_dict.
CHANGE_COLUMNS = ("changed_at", "keys_changed_at", "keys_written_at")
# A conversion that changes these numbers keeps no others.
PROBE = (7, 13, 2**40 + 1)


class RowStorage(nn.Module):
    """Ids, fields, generations and change versions of the rows of a table, by slot.

    Args:
        fields: Names of the integer fields that every row carries.
        device: Where the buffers lie: with the keys and values that they describe.
        capacity: The number of slots.
        evict: Which rows are evicted first: those whose last use ("lru") or whose addition ("oldest") is longest ago.
            Without it neither is recorded.
        track_usage: Whether reads are counted, row by row.

    Attributes:
        access: The lock that callers hold: to look at rows for reading, else for writing.
        version: Counter of changes.
        moved_at, keys_moved_at: The version at which every row, every key, last changed at once.
        layout: Counter of the times that rows were given other slots, or other tensors, all at once.
        columns: The names of the buffers that are saved with an entry for every slot, besides ``ids``.
        optional: The names of the columns that a state to be loaded may lack: clocks and counters.
        saved: The names of all buffers that are saved.
        watched: The names of the buffers from which something is derived.
        recorded: The versions of the tensors whose writes are accounted for.
        average: What averages by place do to a copy.
        clock: The eviction clock.
        free: The slots without a row.
        slots: The map from ids to slots.
        first_new_id: The id of the next row that is added without one.
        expected_check: What ``id_check`` holds.
        was_emptied: Whether the last conversion kept no numbers.
    """

    ids: Tensor  # (capacity,) int64, -1 at a free slot
    next_id: Tensor  # () int64
    generation: Tensor  # (capacity,) int64: the number of rows a slot has held; optimisers reset the state of new ones
    changed_at: Tensor  # (capacity,) int64: the version at which a slot last changed in any way
    keys_changed_at: Tensor  # (capacity,) int64: the same for its key, or whether it holds a row
    keys_written_at: Tensor  # (capacity,) int64: the same, but not by an optimiser
    id_check: Tensor  # (64,) int64: from hashes of slots and ids and the number of writes, which no average of two fits
    # With an option each, and no part of a version: a read is no write.
    used_at: Tensor  # (capacity,) int64: the clock when a row was last used; rows used together share one reading
    added_at: Tensor  # (capacity,) int64: the clock when it was added, each its own
    reads: Tensor  # (capacity,) int64: the number of queries that reported the row
    weight: Tensor  # (capacity,) float64: the sum of its weights there

    def __init__(
        self,
        fields: Sequence[str],
        device: torch.device | str | None = None,
        *,
        capacity: int = 0,
        evict: str | None = None,
        track_usage: bool = False,
    ) -> None:
        super().__init__()
        self.fields = check_field_names(fields)
        self.evict = evict
        self.track_usage = bool(track_usage)
        clocks = () if evict is None else (CLOCK_COLUMNS[evict],)
        self.optional = (*clocks, "reads", "weight") if self.track_usage else clocks
        self.columns = ("generation", *(f"field_{name}" for name in self.fields), *self.optional)
        self.saved = ("ids", "next_id", *self.columns)
        self.watched = ("ids", "next_id", "generation", "id_check", *clocks)
        fields_first = sorted(self.saved[1:], key=lambda name: not name.startswith("field_"))  # as state dicts had them
        for name in ("ids", *fields_first, *CHANGE_COLUMNS):
            dtype = torch.float64 if name == "weight" else torch.int64
            shape = () if name == "next_id" else (capacity,)
            buffer = torch.full(shape, -1 if name == "ids" else 0, dtype=dtype, device=device)
            self.register_buffer(name, buffer, persistent=name not in CHANGE_COLUMNS)
        id_check = torch.zeros(CHECK_SIZE, dtype=torch.int64, device=device)
        self.register_buffer("id_check", id_check, persistent=False)
        self.access = SharedLock()
        self.version = self.moved_at = self.keys_moved_at = self.layout = 0
        self.first_new_id = self.id_hash = self.writes = 0
        self.was_emptied = False
        self._begin()
        self._write_id_check()

    def _begin(self, *, is_average: bool = False) -> None:
        """Derive nothing yet from the buffers."""
        self.clock = EvictionClock(self.evict)
        self.recorded = RecordedVersions()
        self.average = AverageWatch(is_updated=is_average)
        self._changes = ChangeLog()
        self.free = FreeSlots()
        self.slots = SlotTable()
        self._live: tuple[int, Tensor | None] = (-1, None)
        self._live_slots: tuple[int, Tensor] | None = None

    # -- looking rows up -------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return len(self.ids)

    @property
    def used(self) -> int:
        """The slot from which on none has ever held a row."""
        return self.free.used

    @property
    def tenants(self) -> Tenants:
        """A copy of which rows lie in the slots."""
        return Tenants.of(self.ids, self.generation, self.id_check)

    @property
    def counts_reads(self) -> bool:
        """Whether reads are recorded, by a clock or by counters."""
        return self.evict == "lru" or self.track_usage

    def __len__(self) -> int:
        return self.used - len(self.free)

    def ids_at(self, slots: Tensor) -> Tensor:
        """Return the ids at ``slots``, -1 where the slot is -1."""
        if self.capacity == 0:
            return torch.full_like(slots, -1)
        ids = self.ids.index_select(0, slots.clamp(min=0).flatten()).view_as(slots)  # faster than by [...]
        return ids.masked_fill_(slots < 0, -1)

    def live(self) -> Tensor | None:
        """Return which slots below ``used`` hold a row, (used,) bool, or None where all do. Do not write to it."""
        version, mask = self._live
        if version != self.version:
            mask = self.ids[: self.used] >= 0 if len(self.free) else None
            self._live = (self.version, mask)
        return mask

    def live_slots(self) -> Tensor:
        """Return the slots that hold a row, ascending. Do not write to it."""
        known = self._live_slots
        if known is None or known[0] != self.version:
            mask = self.live()
            slots = torch.arange(self.used, device=self.ids.device) if mask is None else mask.nonzero().squeeze(-1)
            self._live_slots = known = (self.version, slots)
        return known[1]

    def view(self, slots: slice | Tensor) -> Mapping[str, Tensor]:
        """Return the rows at ``slots`` as a filter sees them: id and fields by name, id -1 at slot -1."""
        ids = self.ids[slots] if isinstance(slots, slice) else self.ids_at(slots)
        places = slots if isinstance(slots, slice) else slots.clamp(min=0)
        return RowView({"id": ids} | {name: getattr(self, f"field_{name}")[places] for name in self.fields})

    # -- what changed ----------------------------------------------------------------------------------------

    def changed_since(self, version: int, *, keys: bool = False) -> Tensor:
        """Return the slots that changed after ``version``, ascending; with ``keys`` only those whose key did."""
        if (self.keys_moved_at if keys else self.moved_at) > version:
            return torch.arange(self.used, device=self.ids.device)
        recent = self._changes.since(version, keys=keys)
        if recent is not None:
            return recent.to(self.ids.device)
        changed_at = self.keys_changed_at if keys else self.changed_at
        return (changed_at[: self.used] > version).nonzero().squeeze(-1)

    def mark_changed(self, slots: Tensor, *, keys: bool = True) -> None:
        """Record that the rows at ``slots`` were written; without ``keys``, only values or fields."""
        if len(slots):
            self.mark_moved(slots, keys=keys)
            self.writes += 1
            self._write_id_check()
            if keys:
                self.own("keys_written_at")[slots.to(self.ids.device)] = self.version

    def mark_moved(self, slots: Tensor | None = None, *, keys: bool = True) -> None:
        """Record that an optimiser, or something else, may have moved the rows at ``slots``, or all of them.

        Without ``keys``, only their values.
        """
        if slots is not None and len(slots) == 0:
            return
        self.version += 1
        if slots is None:
            self.moved_at = self.version
            if keys:
                self.keys_moved_at = self.version
            return
        slots = slots.to(self.ids.device)
        self.own("changed_at")[slots] = self.version
        if keys:
            self.own("keys_changed_at")[slots] = self.version
        self._changes.record(self.version, slots, keys, rows=self.used)

    def own(self, name: str) -> Tensor:
        """Return a buffer to write to, by a view whose writes torch does not count."""
        buffer = self._buffers[name]
        if buffer is None:
            raise ForeignWriteError(f"rows.{name}: expected a buffer, got None")
        return buffer.data

    # -- writing: callers have checked their arguments -------------------------------------------------------

    def plan(self, batch: WriteBatch) -> WritePlan:
        """Work out what a batch does, and change nothing."""
        incoming, leaving, device = len(batch.ids), batch.leaving, self.ids.device
        placed, gone, free, id_hash = NO_SLOTS, NO_SLOTS, self.free, self.id_hash
        if len(leaving):
            gone = self.ids[leaving.to(device)].cpu()
            free, id_hash = free.free(leaving), id_hash - hash_rows(leaving, gone)
        if incoming:
            placed, free = free.take(incoming)
            id_hash += hash_rows(placed, batch.ids)
        written = torch.cat([batch.slots, placed]) if incoming else batch.slots
        fresh = torch.cat([batch.slots, placed]) if batch.afresh else placed
        changed = torch.cat([leaving, written]).unique() if len(leaving) else written
        is_use = len(written) > 0 and (batch.keys is not None or batch.values is not None)
        reading = self.clock.now if self.evict == "lru" and is_use else None
        added_at = None
        if self.evict == "oldest" and incoming:
            added_at = torch.arange(self.clock.now, self.clock.now + incoming, device=device)
        return WritePlan(
            batch=batch,
            placed=placed,
            written=written,
            gone=gone,
            fresh=fresh,
            generation=self.generation[fresh.to(device)] + 1,
            changed=changed,
            keys_change=batch.keys is not None or incoming > 0 or len(leaving) > 0,
            free=free,
            used_at=reading,
            added_at=added_at,
            clock=self.clock.now + (reading is not None) + (0 if added_at is None else incoming),
            next_id=max(self.first_new_id, int(batch.ids.max()) + 1) if incoming else self.first_new_id,
            id_hash=id_hash,
            writes=self.writes + (len(changed) > 0),
            version=self.version + (len(changed) > 0),
        )

    def apply_plan(self, plan: WritePlan) -> None:
        """Apply a plan: once or again, to the same end."""
        batch, device = plan.batch, self.ids.device
        if len(plan.changed) == 0:
            return
        ids, fresh, written = self.own("ids"), plan.fresh.to(device), plan.written.to(device)
        if len(batch.leaving):
            self.slots.remove(plan.gone)
            # Not where others come: what is there at any time may be read by a signal's handler.
            ids[batch.leaving[~torch.isin(batch.leaving, plan.placed)].to(device)] = -1
        if len(plan.placed):
            self.slots.put(batch.ids, plan.placed)
            ids[plan.placed.to(device)] = batch.ids.to(device)
        self.free = plan.free
        if len(fresh):
            self.own("generation")[fresh] = plan.generation
            self.reset_usage(fresh)
        if len(fresh) or len(batch.leaving):
            self.average.forget()
        if plan.added_at is not None:
            self.own("added_at")[plan.placed.to(device)] = plan.added_at
        if plan.used_at is not None:
            self.own("used_at")[written] = plan.used_at
        for name, column in batch.fields.items():
            self.own(f"field_{name}")[written] = column.to(device)
        self.clock.now = max(self.clock.now, plan.clock)
        self.first_new_id = plan.next_id
        self.own("next_id").fill_(plan.next_id)
        self.id_hash, self.writes = plan.id_hash, plan.writes
        self._write_id_check()
        self.version = max(self.version, plan.version)
        changed = plan.changed.to(device)
        self.own("changed_at")[changed] = plan.version
        if plan.keys_change:
            self.own("keys_changed_at")[changed] = plan.version
            self.own("keys_written_at")[changed] = plan.version
        self._changes.record(self.version, changed, plan.keys_change, rows=self.used)

    def derive(self) -> None:
        """Derive everything from the buffers: after other ones were loaded, copied or unpickled."""
        self._changes = ChangeLog()
        self.layout += 1
        if self.ids.is_meta:  # which names no rows
            self.slots, self.free = SlotTable(), FreeSlots()
            self.clock.restart(None)
            self.mark_moved()
            return
        ids = self.ids.cpu()
        there = ids >= 0
        live = there.nonzero().squeeze(-1)
        ids = ids[live]
        self.free = FreeSlots.of(there)
        self.slots = SlotTable.of(ids, live)
        self.derive_counters(live, ids)

    def derive_counters(self, live: Tensor, ids: Tensor) -> None:
        """Derive next id, check and clock from the buffers; the rows at ``live`` slots have ``ids``."""
        self.first_new_id = max(int(self.next_id), int(ids.max()) + 1 if len(ids) else 0)
        self.own("next_id").fill_(self.first_new_id)
        self.id_hash = hash_rows(live, ids)
        if self.clock.column is not None:
            self.clock.restart(getattr(self, self.clock.column))
        self._changes = ChangeLog()
        self._write_id_check()
        self.mark_moved()

    def reset_usage(self, slots: slice | Tensor) -> None:
        """Count the reads of ``slots`` from 0."""
        if self.track_usage:
            reset_counters(self.own("reads"), self.own("weight"), slots)

    def _write_id_check(self) -> None:
        self.expected_check = id_check_of(self.id_hash, self.writes)
        self.own("id_check").copy_(self.expected_check)

    # -- module conventions ----------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> RowStorage:
        device = self.ids.device
        weight = self.weight if self.track_usage else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None:
            self.weight = keep_sum_dtype(weight, self.weight)
        probe = torch.tensor(PROBE, device=device)
        kept = fn(probe)
        is_emptying = not kept.is_meta and (probe.is_meta or not torch.equal(kept.cpu(), probe.cpu()))
        self.was_emptied = not self.ids.is_meta and is_emptying
        if self.was_emptied:  # ``to_empty`` leaves numbers that mean nothing
            for name in (*CHANGE_COLUMNS, *self.columns, "next_id"):
                self.own(name).zero_()
            self.own("ids").fill_(-1)
            self.derive()
        elif self.ids.device != device:
            self.clock.restart(None)
            self.layout += 1
            self.mark_moved()
        # The buffers may be others, whose writes are counted from 0.
        self.average.remember_again(self.ids, self.generation, self.id_check)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Do nothing: the store loads its rows and these together, or neither."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        derived = ("slots", "_live", "_live_slots", "free", "_changes", "recorded", "clock", "average")
        return {name: value for name, value in state.items() if name not in derived} | {
            "is_average": self.average.is_updated
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_average = state.pop("is_average", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin(is_average=is_average)
        self.derive()
        if is_average:
            self.average.remember(self.tenants, is_updated=True)
