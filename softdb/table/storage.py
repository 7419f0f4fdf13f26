"""`RowStorage`: ids, fields and versions of rows by slot.

A *slot* is a row's position in the tensors. Only compaction moves a row to another slot, since optimizer state and
gradients are laid out by slot, and have to follow. A deleted row leaves a free slot; new rows fill the lowest free
slots. An *id* is the public int64 number of a row. Ids are assigned in ascending order; no id is assigned twice.

An index and an open read record the ``version`` that they used. They can later look up which slots have changed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdb.errors import ForeignWriteError
from softdb.pending_checks import PendingChecks, is_deferred
from softdb.table.average_watch import AverageWatch
from softdb.table.changes import ChangeLog
from softdb.table.eviction import CLOCK_COLUMNS, EvictionClock
from softdb.table.fields import RowView, check_field_names
from softdb.table.id_check import CHECK_SIZE, compute_id_check, hash_rows
from softdb.table.journal import WriteBatch, WritePlan
from softdb.table.locks import SharedLock
from softdb.table.slot_rows import SlotRows
from softdb.table.slots import NO_SLOTS, FreeSlots, SlotTable
from softdb.table.usage import COUNTER_COLUMNS, keep_sum_dtype, reset_counters
from softdb.table.versions import RecordedVersions

__all__ = ["CHANGE_COLUMNS", "RowStorage"]

# Buffers with the version of the last change of each slot. They are not part of a state_dict.
CHANGE_COLUMNS = ("changed_at", "keys_changed_at", "keys_written_at")
# Values that reveal whether a conversion by `torch.nn.Module._apply` keeps the contents of tensors.
PROBE_VALUES = (7, 13, 2**40 + 1)


class RowStorage(nn.Module):
    """Ids, fields, generations and versions of the rows of a table, by slot.

    Args:
        fields: Names of the integer fields of every row.
        device: The device of the buffers, which is that of keys and values.
        capacity: The number of slots.
        evict: "lru" evicts the least recently used rows first, "oldest" the rows added first. With None, no clock
            readings are recorded.
        track_usage: Whether to count the reads of each row.

    Attributes:
        access: The lock that callers hold for reading or writing.
        version: Counter of changes.
        all_changed_at: Version at which all rows last changed at once.
        all_keys_changed_at: Version at which all keys last changed at once.
        layout: Counter of changes to the table as a whole: rows were loaded, copied or averaged, tensors were converted
            or moved to another device, or an interrupted write was finished. Data derived before may be wrong.
        columns: Names of the saved buffers with an entry per slot, except ``ids``.
        optional: Names of the columns of clock readings and usage counters, which a loaded state may lack.
        saved: Names of all saved buffers.
        watched: Names of the buffers from which other attributes are derived.
        recorded: Recorded versions of the tensors. All writes up to these versions have been processed.
        average: Detector of slot-wise averages that mix two rows.
        clock: The eviction clock.
        free: The free slots.
        slots: The map from ids to slots.
        first_new_id: The next id to assign.
        id_hash: Hash of all pairs of slot and id.
        writes: Counter of writes by the store.
        expected_check: Copy of ``id_check`` on the CPU.
        pending_checks: Results of checks on a GPU that the host has not read yet.
        was_emptied: Whether the last conversion discarded the contents of the buffers.
    """

    ids: Tensor  # (capacity,) int64, -1 at a free slot
    next_id: Tensor  # () int64
    generation: Tensor  # (capacity,) int64: number of rows the slot has held; optimizers reset the state of new rows
    changed_at: Tensor  # (capacity,) int64: version of the last change of the slot
    keys_changed_at: Tensor  # (capacity,) int64: version of the last change of its key or occupancy
    keys_written_at: Tensor  # (capacity,) int64: as keys_changed_at, without changes by optimizers
    id_check: Tensor  # (CHECK_SIZE,) int64: checksum of slots and ids; averaged or mixed buffers do not match it
    # Optional buffers. Reads change them without a new version.
    used_at: Tensor  # (capacity,) int64: clock reading of the last use; rows used together share a reading
    added_at: Tensor  # (capacity,) int64: clock reading of the addition, unique per row
    reads: Tensor  # (capacity,) int64: number of queries that counted the row
    weight: Tensor  # (capacity,) float64: sum of its weights in these queries

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
        self.optional = (*clocks, *COUNTER_COLUMNS) if self.track_usage else clocks
        self.columns = ("generation", *(f"field_{name}" for name in self.fields), *self.optional)
        self.saved = ("ids", "next_id", *self.columns)
        self.watched = ("ids", "next_id", "generation", "id_check", *clocks)
        # The order of the keys of a state_dict, for compatibility.
        fields_first = sorted(self.saved[1:], key=lambda name: not name.startswith("field_"))
        for name in ("ids", *fields_first, *CHANGE_COLUMNS):
            dtype = torch.float64 if name == "weight" else torch.int64
            shape = () if name == "next_id" else (capacity,)
            buffer = torch.full(shape, -1 if name == "ids" else 0, dtype=dtype, device=device)
            self.register_buffer(name, buffer, persistent=name not in CHANGE_COLUMNS)
        id_check = torch.zeros(CHECK_SIZE, dtype=torch.int64, device=device)
        self.register_buffer("id_check", id_check, persistent=False)
        self.access = SharedLock()
        self.version = self.all_changed_at = self.all_keys_changed_at = self.layout = 0
        self.first_new_id = self.id_hash = self.writes = 0
        self.was_emptied = False
        self._reset_derived()
        self._write_id_check()

    def _reset_derived(self, *, is_average: bool = False) -> None:
        """Initialize the attributes that are derived from the buffers."""
        self.clock = EvictionClock(self.evict)
        self.recorded = RecordedVersions()
        self.average = AverageWatch(is_updated=is_average)
        self._changes = ChangeLog()
        self.free = FreeSlots()
        self.slots = SlotTable()
        self.pending_checks = PendingChecks()
        self._live: tuple[int, Tensor | None] = (-1, None)
        self._live_slots: tuple[int, Tensor] | None = None

    # -- looking rows up -------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return len(self.ids)

    @property
    def used(self) -> int:
        """Number of slots up to the highest one that has held a row."""
        return self.free.used

    @property
    def slot_rows(self) -> SlotRows:
        """Copy of the ids and generations of all slots."""
        return SlotRows.copy_from(self.ids, self.generation, self.id_check)

    @property
    def counts_reads(self) -> bool:
        """Whether reads are recorded by a clock or by usage counters."""
        return self.evict == "lru" or self.track_usage

    def __len__(self) -> int:
        return self.used - len(self.free)

    def ids_at(self, slots: Tensor) -> Tensor:
        """Return the ids at ``slots``, -1 for slot -1."""
        if self.capacity == 0:
            return torch.full_like(slots, -1)
        ids = self.ids.index_select(0, slots.clamp(min=0).flatten()).view_as(slots)  # This is faster than indexing.
        return ids.masked_fill_(slots < 0, -1)

    def live_mask(self) -> Tensor | None:
        """Return which slots below ``used`` hold a row.

        Returns:
            (used,) bool, which must not be written to; None if all of them hold a row.
        """
        version, mask = self._live
        if version != self.version:
            mask = self.ids[: self.used] >= 0 if len(self.free) else None
            self._live = (self.version, mask)
        return mask

    def live_slots(self) -> Tensor:
        """Return the slots that hold a row, ascending. Do not write to the result."""
        known = self._live_slots
        if known is None or known[0] != self.version:
            mask = self.live_mask()
            if mask is None:
                slots = torch.arange(self.used, device=self.ids.device)
            elif is_deferred(mask):  # The host computes them from the free slots, so that it need not wait.
                slots = self.free.occupied().to(mask.device, non_blocking=True)
            else:
                slots = mask.nonzero().squeeze(-1)
            self._live_slots = known = (self.version, slots)
        return known[1]

    def view(self, slots: slice | Tensor) -> Mapping[str, Tensor]:
        """Return ids and fields of the rows at ``slots`` by name; the id at slot -1 is -1."""
        ids = self.ids[slots] if isinstance(slots, slice) else self.ids_at(slots)
        places = slots if isinstance(slots, slice) else slots.clamp(min=0)
        return RowView({"id": ids} | {name: getattr(self, f"field_{name}")[places] for name in self.fields})

    # -- what changed ----------------------------------------------------------------------------------------

    def changed_since(self, version: int, *, keys: bool = False) -> Tensor:
        """Return the slots that changed after ``version``, ascending.

        Args:
            version: A version of the table.
            keys: Whether to return only slots whose key or occupancy changed.
        """
        if (self.all_keys_changed_at if keys else self.all_changed_at) > version:
            return torch.arange(self.used, device=self.ids.device)
        recent = self._changes.since(version, keys=keys)
        if recent is not None:
            return recent.to(self.ids.device)
        changed_at = self.keys_changed_at if keys else self.changed_at
        return (changed_at[: self.used] > version).nonzero().squeeze(-1)

    def mark_written(self, slots: Tensor, *, keys: bool = True) -> None:
        """Record a write of the store to the rows at ``slots``.

        Args:
            slots: The slots.
            keys: Whether keys were written; otherwise only values or fields were.
        """
        if len(slots):
            self.mark_updated(slots, keys=keys)
            self.writes += 1
            self._write_id_check()
            if keys:
                self.writable_buffer("keys_written_at")[slots.to(self.ids.device)] = self.version

    def mark_updated(self, slots: Tensor | None = None, *, keys: bool = True) -> None:
        """Record an update of rows by an optimizer or other code.

        The host does not wait for a device that holds ``slots``; `changed_since` does.

        Args:
            slots: The slots, which may contain duplicates and free slots; None for all rows.
            keys: Whether keys may have changed; otherwise only values have.
        """
        if slots is not None and len(slots) == 0:
            return
        self.version += 1
        if slots is None:
            self.all_changed_at = self.version
            if keys:
                self.all_keys_changed_at = self.version
            return
        slots = slots.to(self.ids.device)
        self.writable_buffer("changed_at").index_fill_(0, slots, self.version)
        if keys:
            self.writable_buffer("keys_changed_at").index_fill_(0, slots, self.version)
        self._changes.record(self.version, slots, keys, rows=self.used)

    def writable_buffer(self, name: str) -> Tensor:
        """Return a view of a buffer; its writes do not change the version counter."""
        buffer = self._buffers[name]
        if buffer is None:
            raise ForeignWriteError(f"rows.{name}: expected a buffer, got None")
        return buffer.data

    # -- writing: arguments are checked by the callers -------------------------------------------------------

    def plan(self, batch: WriteBatch) -> WritePlan:
        """Compute the result of a batch without changing the table."""
        inserted, removed_slots, device = len(batch.ids), batch.removed_slots, self.ids.device
        inserted_slots, removed_ids, free, id_hash = NO_SLOTS, NO_SLOTS, self.free, self.id_hash
        if len(removed_slots) == len(self) > 0:  # Faster than to free the slots one by one.
            removed_slots = self.live_slots().cpu()
            removed_ids = self.ids[removed_slots.to(device)].cpu()
            free, id_hash = free.free_all(), 0
        elif len(removed_slots):
            removed_ids = self.ids[removed_slots.to(device)].cpu()
            free, id_hash = free.free(removed_slots), id_hash - hash_rows(removed_slots, removed_ids)
        if inserted:
            inserted_slots, free = free.take(inserted)
            id_hash += hash_rows(inserted_slots, batch.ids)
        written_slots = torch.cat([batch.slots, inserted_slots]) if inserted else batch.slots
        reset_slots = torch.cat([batch.slots, inserted_slots]) if batch.new_generation else inserted_slots
        changed_slots = written_slots
        if len(removed_slots):
            changed_slots = torch.cat([removed_slots, written_slots]).unique() if len(written_slots) else removed_slots
        is_use = len(written_slots) > 0 and (batch.keys is not None or batch.values is not None)
        reading = self.clock.now if self.evict == "lru" and is_use else None
        added_at = None
        if self.evict == "oldest" and inserted:
            added_at = torch.arange(self.clock.now, self.clock.now + inserted, device=device)
        return WritePlan(
            batch=batch,
            inserted_slots=inserted_slots,
            written_slots=written_slots,
            removed_ids=removed_ids,
            reset_slots=reset_slots,
            generation=self.generation[reset_slots.to(device)] + 1,
            changed_slots=changed_slots,
            keys_change=batch.keys is not None or inserted > 0 or len(removed_slots) > 0,
            free=free,
            used_at=reading,
            added_at=added_at,
            clock=self.clock.now + (reading is not None) + (0 if added_at is None else inserted),
            next_id=max(self.first_new_id, int(batch.ids.max()) + 1) if inserted else self.first_new_id,
            id_hash=id_hash,
            writes=self.writes + (len(changed_slots) > 0),
            version=self.version + (len(changed_slots) > 0),
        )

    def apply_plan(self, plan: WritePlan) -> None:
        """Apply a plan; repeated calls give the same result."""
        batch, device = plan.batch, self.ids.device
        if len(plan.changed_slots) == 0:
            return
        ids, reset, written = self.writable_buffer("ids"), plan.reset_slots.to(device), plan.written_slots.to(device)
        if len(batch.removed_slots):
            self.slots.remove(plan.removed_ids)
            # A slot that is reused at once keeps its id until the new id is written: a signal handler may read before.
            ids[plan.freed_slots.to(device)] = -1
        if len(plan.inserted_slots):
            self.slots.put(batch.ids, plan.inserted_slots)
            ids[plan.inserted_slots.to(device)] = batch.ids.to(device)
        self.free = plan.free
        if len(reset):
            self.writable_buffer("generation")[reset] = plan.generation
            self.reset_usage(reset)
        if len(reset) or len(batch.removed_slots):
            self.average.reset()
        if plan.added_at is not None:
            self.writable_buffer("added_at")[plan.inserted_slots.to(device)] = plan.added_at
        if plan.used_at is not None:
            self.writable_buffer("used_at")[written] = plan.used_at
        for name, column in batch.fields.items():
            self.writable_buffer(f"field_{name}")[written] = column.to(device)
        self.clock.now = max(self.clock.now, plan.clock)
        self.first_new_id = plan.next_id
        self.writable_buffer("next_id").fill_(plan.next_id)
        self.id_hash, self.writes = plan.id_hash, plan.writes
        self._write_id_check()
        self.version = max(self.version, plan.version)
        changed = plan.changed_slots.to(device)
        self.writable_buffer("changed_at")[changed] = plan.version
        if plan.keys_change:
            self.writable_buffer("keys_changed_at")[changed] = plan.version
            self.writable_buffer("keys_written_at")[changed] = plan.version
        self._changes.record(self.version, changed, plan.keys_change, rows=self.used)

    def derive(self) -> None:
        """Derive all other state from the buffers, after they were loaded or copied."""
        self._changes = ChangeLog()
        self.layout += 1
        if self.ids.is_meta:  # Meta tensors contain no ids.
            self.slots, self.free = SlotTable(), FreeSlots()
            self.clock.restart(None)
            self.mark_updated()
            return
        ids = self.ids.cpu()
        occupied = ids >= 0
        live = occupied.nonzero().squeeze(-1)
        ids = ids[live]
        self.free = FreeSlots.from_mask(occupied)
        self.slots = SlotTable.from_ids(ids, live)
        self.derive_counters(live, ids)

    def derive_counters(self, live: Tensor, ids: Tensor) -> None:
        """Derive next id, checksum and clock from the buffers.

        Args:
            live: The slots that hold a row.
            ids: Their ids.
        """
        self.first_new_id = max(int(self.next_id), int(ids.max()) + 1 if len(ids) else 0)
        self.writable_buffer("next_id").fill_(self.first_new_id)
        self.id_hash = hash_rows(live, ids)
        if self.clock.column is not None:
            self.clock.restart(getattr(self, self.clock.column))
        self._changes = ChangeLog()
        self._write_id_check()
        self.mark_updated()

    def reset_usage(self, slots: slice | Tensor) -> None:
        """Reset the usage counters of ``slots`` to zero."""
        if self.track_usage:
            reset_counters(self.writable_buffer("reads"), self.writable_buffer("weight"), slots)

    def _write_id_check(self) -> None:
        self.expected_check = compute_id_check(self.id_hash, self.writes)
        self.writable_buffer("id_check").copy_(self.expected_check)

    # -- module conventions ----------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> RowStorage:
        device = self.ids.device
        weight = self.weight if self.track_usage else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None:
            self.weight = keep_sum_dtype(weight, self.weight)
        probe = torch.tensor(PROBE_VALUES, device=device)
        kept = fn(probe)
        is_emptying = not kept.is_meta and (probe.is_meta or not torch.equal(kept.cpu(), probe.cpu()))
        self.was_emptied = not self.ids.is_meta and is_emptying
        if self.was_emptied:  # `to_empty` leaves the buffers uninitialized.
            for name in (*CHANGE_COLUMNS, *self.columns, "next_id"):
                self.writable_buffer(name).zero_()
            self.writable_buffer("ids").fill_(-1)
            self.derive()
        elif self.ids.device != device:
            self.clock.restart(None)
            self.layout += 1
            self.mark_updated()
        # The version counters of new buffers start from 0.
        self.average.refresh_recorded(self.ids, self.generation, self.id_check)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Do nothing: the store loads keys, values and buffers together, or none."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        derived = {
            "slots",
            "_live",
            "_live_slots",
            "free",
            "_changes",
            "recorded",
            "clock",
            "average",
            "pending_checks",
        }
        return {name: value for name, value in state.items() if name not in derived} | {
            "is_average": self.average.is_updated
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_average = state.pop("is_average", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset_derived(is_average=is_average)
        self.derive()
        if is_average:
            self.average.record(self.slot_rows, is_updated=True)
