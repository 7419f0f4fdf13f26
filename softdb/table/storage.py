"""Which row lies where: ids, slots, fields, what changed when, and what was used.

A *slot* is a row's place in the tensors. Slots never move, since optimiser state and gradients are laid out by slot;
a deleted row leaves a hole that a later row fills, lowest slot first. Ids are the user's names for rows: an int64
each, assigned in order and never twice.

`RowStorage` calls nobody. Whoever depends on rows (an index, a read that waits for its backward)
remembers the ``version`` it saw and asks what changed since.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from softdb._checks import describe, list_ids
from softdb.errors import ArgumentError, DtypeError, DuplicateIdError, FieldError, ForeignWriteError, UnknownIdError
from softdb.table.changes import ChangeLog, Differences, Overwrites, Tenants, TensorState, state_of, version_of
from softdb.table.fields import RowView, check_column, check_field_names
from softdb.table.journal import Growth, WriteBatch, WritePlan
from softdb.table.locks import SharedLock
from softdb.table.slots import NO_SLOTS, FreeSlots, SlotTable, resized

__all__ = ["NO_SLOTS", "RowStorage"]


MAX_ID = 2**63 - 2


STAMPS = ("changed_at", "keys_changed_at", "keys_written_at")


# The check of ids is below this: a float32 holds it, so that averaging equal checks leaves them as they are.
ID_CHECK_MASK, NO_CHECK = 2**20 - 1, -1


# An average of two equal whole numbers may be another one, by rounding: about one in three, for many decays. With so
# many numbers it is noticed.
ID_CHECK_PATTERN = 1_000_003 + 40_503 * torch.arange(64, device="cpu")


# What a conversion does to these tells whether it keeps numbers.
PROBE = (7, 13, 2**40 + 1)


# The log of changes names at most this share of the slots, or as many.
LOGGED_SHARE, LOGGED_SLOTS = 1 / 8, 4096


# By which buffer the next row to evict is found: the one with the lowest entry goes first.
TURNS = {"lru": "used_at", "oldest": "added_at"}


# The buffers from which something is derived, by the rule for eviction.
WATCHED: dict[str | None, tuple[str, ...]] = {None: ("ids", "next_id", "generation", "id_check")}


WATCHED |= {rule: (*WATCHED[None], clock) for rule, clock in TURNS.items()}


# Of the rows, this share is lined up for eviction at a time, found by the turns of about so many of them.
QUEUE_SHARE, QUEUE_SAMPLE = 1 / 8, 4096


AVERAGED = (
    "rows.ids: expected the ids of rows, got numbers that something else has averaged or overwritten (an average with "
    "use_buffers=True or of a state_dict, or one that mixes two rows); average by id with "
    "softdb.optim.update_average(average, model, decay), and load a state_dict to go on"
)


class RowStorage(nn.Module):
    """Ids, fields, live slots and change versions of a table of rows.

    Args:
        fields: Names of the integer fields that every row carries.
        device: Where the buffers lie: beside the keys and values that they describe.
        evict: Which rows `to_evict` names: those whose last use ("lru") or whose placing ("oldest") is longest ago.
            Without it neither is noted.
        track_usage: Whether reads are counted, row by row.
    """

    ids: Tensor  # (capacity,) int64, -1 at a free slot
    next_id: Tensor  # () int64
    generation: Tensor  # (capacity,) int64: how many rows a slot has held; optimisers start a new one's state afresh
    changed_at: Tensor  # (capacity,) int64: the version at which a slot last changed in any way
    keys_changed_at: Tensor  # (capacity,) int64: the same for its key, or whether it holds a row
    keys_written_at: Tensor  # (capacity,) int64: the same, but not by an optimiser
    id_check: Tensor  # (64,) int64: from hashes of slots and ids and the number of writes, which no average of two fits
    # With an option each, and no part of a version: a read is no write.
    used_at: Tensor  # (capacity,) int64: the turn at which a row was last used; rows used together share one
    added_at: Tensor  # (capacity,) int64: the turn at which it was placed, each its own
    reads: Tensor  # (capacity,) int64: how many queries were told of the row
    weight: Tensor  # (capacity,) float64: the sum of its weights there
    # Whether an average by slots has been updated here.
    _is_average = False

    def __init__(
        self,
        fields: Sequence[str],
        device: torch.device | str | None = None,
        *,
        evict: str | None = None,
        track_usage: bool = False,
    ) -> None:
        super().__init__()
        self.fields = check_field_names(fields)
        self.evict = evict
        self.track_usage = track_usage
        self.register_buffer("ids", torch.empty(0, dtype=torch.int64, device=device))
        for name in self.fields:
            self.register_buffer(f"field_{name}", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("next_id", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("generation", torch.empty(0, dtype=torch.int64, device=device))
        if evict is not None:
            self.register_buffer(TURNS[evict], torch.empty(0, dtype=torch.int64, device=device))
        if track_usage:
            self.register_buffer("reads", torch.empty(0, dtype=torch.int64, device=device))
            self.register_buffer("weight", torch.empty(0, dtype=torch.float64, device=device))
        for name in STAMPS:
            self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("id_check", torch.zeros(64, dtype=torch.int64, device=device), persistent=False)
        self.access = SharedLock()  # whose callers hold it: to look at rows for reading, else for writing
        self.version = 0
        self.moved_at = self.keys_moved_at = 0  # the version at which every row, every key, last changed at once
        self._changes = ChangeLog()
        self._recorded: dict[str, TensorState] = {}
        self._next_id = self._id_hash = self._writes = 0
        self._expected_check = ID_CHECK_PATTERN  # what `id_check` holds
        self._tenants: Tenants | None = None
        self._mixed = self._started = NO_SLOTS  # of an average by slots: ids of mixed rows; slots that were empty
        self._next_turn = 0  # above every turn there is
        self._queue: tuple[Tensor, Tensor] | None = None  # slots and their turns when lined up, the first to go first
        self._free = FreeSlots()
        self._slots = SlotTable()
        self._live: tuple[int, Tensor | None] = (0, None)
        self._live_slots: tuple[int, Tensor] | None = None
        self.was_emptied = False  # by the last conversion
        self._write_id_check()

    # -- reading the books -----------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return len(self.ids)

    @property
    def columns(self) -> list[str]:
        """The names of the buffers that are saved with an entry for every slot, beside ``ids``."""
        return ["generation", *(f"field_{name}" for name in self.fields), *self.optional]

    @property
    def optional(self) -> list[str]:
        """The names of the columns that a state to be loaded may lack: clocks and counters."""
        clocks = [] if self.evict is None else [TURNS[self.evict]]
        return clocks + (["reads", "weight"] if self.track_usage else [])

    @property
    def saved(self) -> list[str]:
        """The names of all buffers that are saved."""
        return ["ids", "next_id", *self.columns]

    @property
    def used(self) -> int:
        """From which slot on none has ever held a row."""
        return self._free.used

    def __len__(self) -> int:
        return self.used - len(self._free)

    def find(self, ids: Tensor) -> Tensor:  # (m,) int64 on the CPU -> (m,)
        """The slots of ``ids``, -1 where there is no such row."""
        return self._slots.find(ids)

    @property
    def names_differ(self) -> bool:
        """Whether no id is given to two rows."""
        return self._slots.entries == len(self)

    def slots_of(self, name: str, ids: Tensor) -> Tensor:
        """The slots of ``ids``; an id without a row is an error that names the argument ``name``."""
        slots = self.find(ids)
        missing = ids[slots < 0]
        if len(missing):
            raise UnknownIdError(f"{name}: expected ids of rows in the store, got unknown {list_ids(missing)}")
        return slots

    def ids_at(self, slots: Tensor) -> Tensor:
        """The ids at ``slots``, -1 where the slot is -1."""
        if self.capacity == 0:
            return torch.full_like(slots, -1)
        ids = self.ids.index_select(0, slots.clamp(min=0).flatten()).view_as(slots)  # faster than by [...]
        return ids.masked_fill_(slots < 0, -1)

    def live(self) -> Tensor | None:
        """Which slots below ``used`` hold a row: (used,) bool, or None where all do. Do not write to it."""
        version, mask = self._live
        if version != self.version:
            mask = self.ids[: self.used] >= 0 if len(self._free) else None
            self._live = (self.version, mask)
        return mask

    def live_slots(self) -> Tensor:
        """The slots that hold a row, ascending. Do not write to it."""
        known = self._live_slots
        if known is None or known[0] != self.version:
            mask = self.live()
            slots = torch.arange(self.used, device=self.ids.device) if mask is None else mask.nonzero().squeeze(-1)
            self._live_slots = known = (self.version, slots)
        return known[1]

    def view(self, slots: slice | Tensor) -> Mapping[str, Tensor]:
        """The rows at ``slots`` as a filter sees them: their id and fields by name, id -1 at slot -1."""
        ids = self.ids[slots] if isinstance(slots, slice) else self.ids_at(slots)
        places = slots if isinstance(slots, slice) else slots.clamp(min=0)
        return RowView({"id": ids} | {name: self.field(name)[places] for name in self.fields})

    def field(self, name: str) -> Tensor:  # (capacity,)
        """One field of every slot."""
        column: Tensor = getattr(self, f"field_{name}")
        return column

    # -- what changed ----------------------------------------------------------------------------------------

    def changed_since(self, version: int, *, keys: bool = False) -> Tensor:
        """The slots that changed after ``version``, ascending; with ``keys`` only those whose key did."""
        if (self.keys_moved_at if keys else self.moved_at) > version:
            return torch.arange(self.used, device=self.ids.device)
        recent = self._changes.since(version, keys=keys)
        if recent is not None:
            return recent.to(self.ids.device)
        changed_at = self.keys_changed_at if keys else self.changed_at
        return (changed_at[: self.used] > version).nonzero().squeeze(-1)

    def mark_changed(self, slots: Tensor, *, keys: bool = True) -> None:
        """Note that the rows at ``slots`` were written; without ``keys``, only values or fields."""
        if len(slots):
            slots = self._note(slots, keys=keys)
            self._writes += 1
            self._write_id_check()
            if keys:
                self.own("keys_written_at")[slots] = self.version

    def mark_moved(self, slots: Tensor | None = None, *, keys: bool = True) -> None:
        """Note that an optimiser, or whoever it was, may have moved the rows at ``slots``, or all of them.

        Without ``keys``, only their values.
        """
        if slots is not None:
            if len(slots):
                self._note(slots, keys=keys)
            return
        self.version += 1
        self.moved_at = self.version
        if keys:
            self.keys_moved_at = self.version

    def _note(self, slots: Tensor, *, keys: bool) -> Tensor:
        self.version += 1
        slots = slots.to(self.ids.device)
        self.own("changed_at")[slots] = self.version
        if keys:
            self.own("keys_changed_at")[slots] = self.version
        self._record(slots, keys)
        return slots

    # -- writes of others: torch counts them, as it does not those by `own` -----------------------------------

    def own(self, name: str) -> Tensor:
        """Return a buffer to write to, by a view whose writes torch does not count."""
        buffer = self._buffers[name]
        if buffer is None:
            raise ForeignWriteError(f"rows.{name}: expected a buffer, got None")
        return buffer.data

    @property
    def _watched(self) -> tuple[str, ...]:
        """The buffers from which something is derived."""
        return WATCHED[self.evict]

    def record_versions(self, tables: Mapping[str, Tensor], lent: frozenset[str] = frozenset()) -> None:
        """Record that every write so far to ``tables`` and to the buffers is accounted for; not to ``lent`` ones."""
        own = {name: getattr(self, name) for name in self._watched if name not in lent} | dict(tables)
        kept = {name: state for name, state in self._recorded.items() if name in lent}
        self._recorded = kept | {name: state_of(tensor) for name, tensor in own.items()}

    def is_own(self, name: str, table: Tensor) -> bool:
        """Whether ``table`` is the one whose writes are recorded under ``name``, not another in its place."""
        recorded = self._recorded.get(name)
        return recorded is not None and recorded.table() is table

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Keep no weak reference to tensors meanwhile; the caller records them again."""
        self._recorded = {}
        yield

    def record_step(self, name: str, before: TensorState, table: Tensor) -> None:
        """Record that an optimiser's step from state ``before`` on is accounted for, if it was the only write."""
        if before.equals(self._recorded.get(name)):
            self._recorded[name] = state_of(table)

    def is_unchanged(self, tables: Mapping[str, Tensor]) -> bool:
        """Whether nothing else has written to ``tables`` or the buffers, or replaced them."""
        buffers = self._buffers
        for name, (reference, place, version) in self._recorded.items():
            tensor = tables.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is None or reference() is not tensor or tensor.data_ptr() != place:
                return False
            if version != version_of(tensor):
                return False
        complete = len(self._recorded) == len(tables) + len(self._watched)
        return complete and not self._is_overwritten_uncounted

    @property
    def _is_overwritten_uncounted(self) -> bool:
        """Whether ``next_id`` or the check of ids was written to by ``.data``; not looked at on other devices."""
        next_id, id_check = self._buffers["next_id"], self._buffers["id_check"]
        if next_id is None or id_check is None or not next_id.is_cpu or not id_check.is_cpu:
            return False
        return next_id.item() != self._next_id or not torch.equal(id_check, self._expected_check)

    def compare_versions(self, tables: Mapping[str, Tensor]) -> Differences:
        """Return the names of ``tables`` and buffers that something else has written to, and of replaced ones."""
        written, replaced = set[str](), set[str]()
        for name in (*self._watched, *tables):
            tensor: Tensor = tables[name] if name in tables else getattr(self, name)
            recorded = self._recorded.get(name)
            if recorded is None or recorded.table() is not tensor:
                replaced.add(name)
            elif not state_of(tensor).equals(recorded):
                written.add(name)
        if not replaced & {"ids", "next_id", "id_check"} and self._is_overwritten_uncounted:
            written |= {"ids", "next_id"}
            if not torch.equal(self.id_check.cpu(), self._expected_check):
                written.add("id_check")
        return Differences(frozenset(written), frozenset(replaced))

    def check_lent(self, names: Iterable[str]) -> None:
        """Raise unless the buffers in the place of the table's own, as functional_call lends them, name its rows."""
        for name in names:
            recorded = self._recorded.get(name)
            own = None if recorded is None else recorded.table()
            if name in ("ids", "next_id") and (own is None or not torch.equal(own, getattr(self, name))):
                raise ForeignWriteError(
                    f"rows.{name}: expected the store's own buffer or a copy of it, got another; pass functional_call "
                    "the Parameters only, or buffers of the same rows"
                )

    def follow_overwrites(self, written: Iterable[str]) -> Overwrites:
        """Derive everything anew from buffers that something else has written to.

        In-place loading (torch.distributed.checkpoint), copies of another store's buffers (AveragedModel) and
        broadcasts (DistributedDataParallel) are whole sets of rows. Averaged ids are not.

        Raises:
            ForeignWriteError: The buffers do not describe rows, or an average mixes two rows.
        """
        written = frozenset(written)
        copied = "id_check" in written  # which is no part of a state_dict
        if copied:
            self.observe_average()
        if len(self._mixed):
            raise ForeignWriteError(
                f"the average mixes two rows in each of {len(self._mixed)} slots (ids {list_ids(self._mixed)}), since "
                "rows of the averaged store were replaced between two updates; average by id with "
                "softdb.optim.update_average(average, model, decay), and load a state_dict to go on"
            )
        self._check_overwritten(copied=copied)
        if copied:
            self._writes = max(self._writes, int(self.id_check[0]))
            for name in STAMPS:  # of another store's versions
                if getattr(self, name).is_contiguous():
                    self.own(name).zero_()
        ids = self.ids.cpu()
        live = (ids >= 0).nonzero().squeeze(-1)
        same = len(live) == len(self) and bool((self.find(ids[live]) == live).all())
        if same:
            self._set_next_id(max(int(self.next_id), int(ids.max()) + 1 if len(live) else 0))
            self._id_hash = _hash(live, ids[live])
            self._write_id_check()
            self._queue = None
            self._changes = ChangeLog()
            self.mark_moved()
            if self.evict is not None and self.capacity:
                self._next_turn = max(self._next_turn, int(self._turns.max()) + 1)
        else:
            self.rebuild()
        started, self._started = self._started, NO_SLOTS
        return Overwrites(started, not same)

    def _check_overwritten(self, *, copied: bool) -> None:
        """Raise unless the buffers describe rows; ``copied`` if all of them have been written to."""
        ids = self.ids.cpu()
        named = ids[ids >= 0]
        slots = (ids >= 0).nonzero().squeeze(-1)
        check = self.id_check.cpu()
        fits = not copied or torch.equal(check, _id_check(_hash(slots, named), int(check[0])))
        whole = len(ids) == 0 or int(ids.min()) >= -1
        if fits and whole and len(named.unique()) == len(named) and int(self.next_id) >= 0:
            return
        raise ForeignWriteError(AVERAGED)

    def remember_tenants(self, *, is_updated: bool = False) -> None:
        """Remember which rows are where, to be compared when something else averages and copies rows here."""
        self._is_average = is_updated
        self._tenants = Tenants(self.ids.clone(), self.generation.clone(), version_of(self.id_check))

    def forget_remains(self) -> None:
        """Remember that free slots hold zeros."""
        if self._tenants is not None:
            self.remember_tenants(is_updated=self._is_average)

    def observe_average(self) -> None:
        """Find slots in which the last update of an average mixed what they held before with another row.

        Torch averages by place, without a call that could be followed, but walks over the module's Parameters each
        time: before the next update, or before the average is exchanged with the model, this is called.
        """
        known = self._tenants
        if known is None or version_of(self.id_check) == known.version:
            return
        # An average begins as a copy: nothing is mixed by the first update.
        is_first = not self._is_average and version_of(self.id_check) == known.version + 1
        if not is_first and len(known.ids) == len(self.ids):
            held, holds, other = known.ids >= 0, self.ids >= 0, known.generation != self.generation
            self._mixed = torch.cat([self._mixed, self.ids[held & holds & other].cpu()])
            self._started = torch.cat([self._started, (~held & holds).nonzero().squeeze(-1).cpu()])
        self.remember_tenants(is_updated=True)
        if len(known.ids) == len(self.ids):  # a slot that has become free still holds what remains of its row
            kept = torch.where((self.ids < 0) & (known.ids >= 0), known.ids, self.ids)
            self._tenants = cast(Tenants, self._tenants)._replace(ids=kept)
        if len(self._mixed):
            self.own("id_check").fill_(NO_CHECK)  # so that a store that these buffers are copied to notices, too

    # -- writing: callers have checked their arguments -------------------------------------------------------

    def new_ids(self, count: int) -> Tensor:
        """The next ``count`` ids; they are taken only once they are placed."""
        if self._next_id + count - 1 > MAX_ID:
            raise ArgumentError(f"ids: the ids up to {MAX_ID} are used up; give ids of deleted rows explicitly")
        return torch.arange(self._next_id, self._next_id + count, device="cpu")

    def check_new(self, ids: Tensor) -> None:
        """Raise if one of ``ids`` names a row already, or is too large to be one."""
        taken = ids[self.find(ids) >= 0]
        if len(taken):
            raise DuplicateIdError(f"ids: expected ids that are not in the store, got existing {list_ids(taken)}")
        check_largest(ids)

    def slots_needed(self, count: int) -> int:
        """The capacity that ``count`` more rows need."""
        return self.used + max(0, count - len(self._free))

    def prepare(self, ids: Tensor) -> None:
        """Take the memory that it needs to find ``ids``."""
        self._slots.widen(ids, len(self))

    def plan(self, batch: WriteBatch, growth: Growth | None = None) -> WritePlan:
        """Work out what a batch does, and change nothing."""
        incoming, leaving, device = len(batch.ids), batch.leaving, self.ids.device
        placed, gone, free, id_hash = NO_SLOTS, NO_SLOTS, self._free, self._id_hash
        if len(leaving):
            gone = self.ids[leaving.to(device)].cpu()
            free, id_hash = free.free(leaving), id_hash - _hash(leaving, gone)
        if incoming:
            placed, free = free.take(incoming)
            id_hash += _hash(placed, batch.ids)
        written = torch.cat([batch.slots, placed]) if incoming else batch.slots
        fresh = torch.cat([batch.slots, placed]) if batch.afresh else placed
        changed = torch.cat([leaving, written]).unique() if len(leaving) else written
        generation = self.generation if growth is None else growth.buffers["generation"]
        is_use = len(written) > 0 and (batch.keys is not None or batch.values is not None)
        turn = self._next_turn if self.evict == "lru" and is_use else None
        ages = None
        if self.evict == "oldest" and incoming:
            ages = torch.arange(self._next_turn, self._next_turn + incoming, device=device)
        return WritePlan(
            batch=batch,
            growth=growth,
            placed=placed,
            written=written,
            gone=gone,
            fresh=fresh,
            generation=generation[fresh.to(device)] + 1,
            changed=changed,
            keys_change=batch.keys is not None or incoming > 0 or len(leaving) > 0,
            free=free,
            turn=turn,
            ages=ages,
            next_turn=self._next_turn + (turn is not None) + (0 if ages is None else incoming),
            next_id=max(self._next_id, int(batch.ids.max()) + 1) if incoming else self._next_id,
            id_hash=id_hash,
            writes=self._writes + (len(changed) > 0),
            version=self.version + (len(changed) > 0),
        )

    def carry_out(self, plan: WritePlan) -> None:
        """Carry out a plan: once or again, to the same end."""
        batch, device = plan.batch, self.ids.device
        if len(plan.changed) == 0:
            return
        ids, fresh, written = self.own("ids"), plan.fresh.to(device), plan.written.to(device)
        if len(batch.leaving):
            self._slots.remove(plan.gone)
            # Not where others come: what is there at any time may be read by a signal's handler.
            ids[batch.leaving[~torch.isin(batch.leaving, plan.placed)].to(device)] = -1
        if len(plan.placed):
            self._slots.put(batch.ids, plan.placed)
            ids[plan.placed.to(device)] = batch.ids.to(device)
        self._free = plan.free
        if len(fresh):
            self.own("generation")[fresh] = plan.generation
            self.forget_usage(fresh)
        if len(fresh) or len(batch.leaving):
            self._tenants = None
        if plan.ages is not None:
            self.own("added_at")[plan.placed.to(device)] = plan.ages
        if plan.turn is not None:
            self.own("used_at")[written] = plan.turn
        for name, column in batch.fields.items():
            self.own(f"field_{name}")[written] = column.to(device)
        self._next_turn = max(self._next_turn, plan.next_turn)
        self._set_next_id(plan.next_id)
        self._id_hash, self._writes = plan.id_hash, plan.writes
        self._write_id_check()
        self.version = max(self.version, plan.version)
        changed = plan.changed.to(device)
        self.own("changed_at")[changed] = plan.version
        if plan.keys_change:
            self.own("keys_changed_at")[changed] = plan.version
            self.own("keys_written_at")[changed] = plan.version
        self._record(changed, plan.keys_change)

    def _record(self, slots: Tensor, keys: bool) -> None:
        self._changes.record(self.version, slots, keys, limit=max(LOGGED_SLOTS, int(LOGGED_SHARE * self.used)))

    def resize(self, capacity: int) -> None:
        """Make room for ``capacity`` rows, at least those in use."""
        self.install(self.resized(capacity))

    def resized(self, capacity: int) -> dict[str, Tensor]:
        """The buffers, with room for ``capacity`` rows; memory may run out before they are installed."""
        buffers = {name: resized(getattr(self, name), capacity) for name in (*STAMPS, *self.columns)}
        return buffers | {"ids": resized(self.ids, capacity, fill=-1)}

    def stamps(self, capacity: int, *, lasting: bool) -> dict[str, Tensor]:
        """The buffers that say when rows last changed: never; not ``lasting`` ones take no memory, and no entries."""
        never = torch.zeros(capacity if lasting else 1, dtype=torch.int64, device=self.ids.device)
        return {name: never.clone() if lasting else never.expand(capacity) for name in STAMPS}

    def install(self, buffers: Mapping[str, Tensor]) -> None:
        """Use these buffers from now on."""
        for name, buffer in buffers.items():
            setattr(self, name, buffer)

    def rebuild(self) -> None:
        """Draw up the books anew from the buffers: after ``load_state_dict`` or unpickling."""
        if self.ids.is_meta:  # which names no rows
            self._slots, self._changes, self._queue, self._free = SlotTable(), ChangeLog(), None, FreeSlots()
            self.mark_moved()
            return
        ids = self.ids.cpu()
        there = ids >= 0
        live = there.nonzero().squeeze(-1)
        ids = ids[live]
        self._free = FreeSlots.of(there)
        self._slots = SlotTable()
        self._slots.widen(ids, 0)
        self._slots.put(ids, live)
        self._set_next_id(max(int(self.next_id), int(ids.max()) + 1 if len(ids) else 0))
        self._id_hash = _hash(live, ids)
        self._write_id_check()
        self._changes = ChangeLog()
        self._queue = None
        if self.evict is not None:
            turns = self._turns
            self._next_turn = int(turns.max()) + 1 if len(turns) else 0
        self.mark_moved()

    def _set_next_id(self, value: int) -> None:
        if value != self._next_id or value != int(self.next_id):
            self._next_id = value
            self.own("next_id").fill_(value)

    def _write_id_check(self) -> None:
        self._expected_check = _id_check(self._id_hash, self._writes)
        self.own("id_check").copy_(self._expected_check)

    # -- use and eviction ------------------------------------------------------------------------------------

    def note_use(self, slots: Tensor) -> None:
        """Note that the rows at ``slots`` are used now, all at the same turn."""
        if self.evict == "lru":
            self.own("used_at")[slots.to(self.used_at.device)] = self._next_turn
            self._next_turn += 1

    @property
    def counts_reads(self) -> bool:
        """Whether `note_read` notes anything."""
        return self.evict == "lru" or self.track_usage

    def note_read(self, slots: Tensor, weights: Tensor) -> None:  # of one shape
        """Note that a read reports ``slots``, -1 for none, with ``weights``."""
        if not self.counts_reads:
            return
        reported = slots >= 0
        slots = slots[reported]
        with self.access.alone:
            self.note_use(slots)
            if self.track_usage:
                self.own("reads").index_add_(0, slots, torch.ones_like(slots))
                self.own("weight").index_add_(0, slots, weights.detach()[reported].to(self.weight.dtype))

    def forget_usage(self, slots: slice | Tensor) -> None:
        """Count the uses of ``slots`` from 0."""
        if self.track_usage:
            self.own("reads")[slots] = 0
            self.own("weight")[slots] = 0.0

    def to_evict(self, count: int, spared: Tensor) -> Tensor:
        """The slots of the ``count`` rows to go first, of equals the lowest; ``spared`` slots stay.

        There must be as many. Costs a look at every slot only once in a while: whatever happens to a row gives it a
        later turn than all that are lined up have, or makes its slot a hole, so the line needs no more than a glance
        at its front.
        """
        spared = spared.to(self.ids.device)
        chosen = None if self._queue is None else self._take(count, spared)
        while chosen is None:
            self._line_up(count + len(spared))
            chosen = self._take(count, spared)
        return chosen

    @property
    def _turns(self) -> Tensor:  # (capacity,)
        turns: Tensor = getattr(self, TURNS.get(self.evict or "", "used_at"))
        return turns

    def _line_up(self, least: int) -> None:
        """Sort the rows of the lowest turns into a queue, ``least`` of them or more."""
        turns = self._turns[: self.used]
        sample = turns[:: max(1, len(turns) // QUEUE_SAMPLE)].sort().values
        waiting = turns <= sample[int(QUEUE_SHARE * len(sample))]
        slots = (waiting & (self.ids[: self.used] >= 0)).nonzero().squeeze(-1)
        if len(slots) < least:
            slots = self.live_slots()
        turns, order = turns[slots].sort(stable=True)
        self._queue = slots[order], turns

    def _take(self, count: int, spared: Tensor) -> Tensor | None:
        """The first ``count`` of the queue that still wait there and are not ``spared``; None if there are fewer."""
        if self._queue is None:
            return None
        queue, turns = self._queue
        width = 2 * (count + len(spared))
        while True:
            front = queue[:width]
            waiting = (self._turns[front] == turns[:width]) & (self.ids[front] >= 0)
            chosen = (waiting & ~torch.isin(front, spared)).nonzero().squeeze(-1)[:count]
            if len(chosen) == count or width >= len(queue):
                break
            width *= 4
        if len(chosen) < count:
            return None
        gone = int(waiting.nonzero()[0])
        self._queue = queue[gone:], turns[gone:]
        return front[chosen]

    # -- fields ----------------------------------------------------------------------------------------------

    def check_fields(self, given: object, count: int, *, complete: bool) -> dict[str, Tensor]:
        """``given`` as int64 columns of ``count`` entries; with ``complete`` every field must be there."""
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise DtypeError(f"fields: expected a mapping from field name to int64 tensor, got {describe(given)}")
        known = ", ".join(map(repr, self.fields)) or "none"
        unknown = [name for name in given if name not in self.fields]
        if unknown:
            raise FieldError(f"fields: expected names among this store's fields ({known}), got {unknown[0]!r}")
        missing = [name for name in self.fields if name not in given]
        if complete and missing:
            raise FieldError(f"fields: expected a column for every field ({known}), {missing[0]!r} is missing")
        return {name: check_column(name, column, count) for name, column in given.items()}

    def invariants(self) -> Iterator[tuple[str, bool]]:
        """What has to be true of the books, and whether it is."""
        live, ids = (self.ids >= 0).cpu(), self.ids.cpu()
        named, slots = ids[live], live.nonzero().squeeze(-1)
        holes = (~live[: self.used]).nonzero().squeeze(-1)
        buffers = [getattr(self, name) for name in (*STAMPS, *self.columns)]
        yield "every buffer has an entry for each slot", all(len(buffer) == self.capacity for buffer in buffers)
        yield "no row lies beyond those in use", self.used <= self.capacity and not bool(live[self.used :].any())
        yield "the holes are those without an id", torch.equal(self._free.all(), holes)
        yield "each id is found in its slot", bool((self.find(named) == slots).all()) and self.names_differ
        yield "ids are below the next", bool((named < self._next_id).all()) and int(self.next_id) == self._next_id
        yield "nothing changes after the last version", bool((self.changed_at <= self.version).all())
        if self.evict is not None:
            yield "turns are below the next", bool((self._turns.cpu()[live] < self._next_turn).all())
        if self.evict == "oldest":
            yield "no two rows are as old", len(self._turns.cpu()[live].unique()) == len(named)

    # -- copies ----------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        return f"rows={len(self)}, capacity={self.capacity}"

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> RowStorage:
        device = self.ids.device
        weight = self.weight if self.track_usage else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None and self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.ids.device)  # a sum over many reads: narrow numbers would stop rising
        probe = torch.tensor(PROBE, device=device)
        kept = fn(probe)
        is_emptying = not kept.is_meta and (probe.is_meta or not torch.equal(kept.cpu(), probe.cpu()))
        self.was_emptied = not self.ids.is_meta and is_emptying
        if self.was_emptied:
            self._clear()  # ``to_empty`` leaves numbers that mean nothing
        elif self.ids.device != device:
            self._queue = None
            self.mark_moved()
        self.forget_remains()  # the buffers may be others, whose writes are counted from 0
        return self

    def check_own_ids(self) -> None:
        """Raise unless the ids are those that were written last: by ``.data`` others may have come unnoticed."""
        ids = self.ids.cpu()
        slots = (ids >= 0).nonzero().squeeze(-1)
        if _hash(slots, ids[slots]) & ID_CHECK_MASK != self._id_hash & ID_CHECK_MASK:
            raise ForeignWriteError(AVERAGED)

    def _clear(self) -> None:
        for name in (*STAMPS, *self.columns, "next_id"):
            self.own(name).zero_()
        self.own("ids").fill_(-1)
        self.rebuild()

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: the store loads its rows and these together, or neither."""

    def load(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load as modules do by ``_load_from_state_dict``; clocks and counters that are missing start from 0."""
        self._mixed = self._started = NO_SLOTS
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.optional:
            if prefix + name not in state_dict:
                dtype = torch.float64 if name == "weight" else torch.int64
                begun = torch.zeros(self.capacity, dtype=dtype, device=self.ids.device)
                if name == TURNS["oldest"]:  # no two rows are as old
                    begun = torch.arange(self.capacity, device=self.ids.device)
                setattr(self, name, begun)
        for name in self.saved:  # ``assign=True`` takes any dtype
            column = getattr(self, name)
            # Another store may be loaded from the same tensors.
            copied = column.data_ptr() == getattr(state_dict.get(prefix + name), "data_ptr", int)()
            setattr(self, name, column.to(torch.float64 if name == "weight" else torch.int64, copy=copied))
        if self.changed_at.device != self.ids.device:  # by ``assign=True``, which brings no stamps
            self.install(self.stamps(self.capacity, lasting=True))
            self.id_check = torch.zeros(64, dtype=torch.int64, device=self.ids.device)
        if self._tenants is not None:  # of an average, most likely, that goes on
            self.remember_tenants(is_updated=True)
        self.rebuild()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for derived in (
            "_slots",
            "_live",
            "_live_slots",
            "_free",
            "_changes",
            "_recorded",
            "_queue",
            "_tenants",
            "_mixed",
            "_started",
        ):
            del state[derived]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._live, self._live_slots, self._recorded, self._tenants = (-1, None), None, {}, None
        self._mixed = self._started = NO_SLOTS
        if "id_check" not in self._buffers:  # pickled by an older version
            self.register_buffer("id_check", self.next_id.new_zeros(64), persistent=False)
        self.rebuild()
        if self._is_average:
            self.remember_tenants(is_updated=True)


def _id_check(id_hash: int, writes: int) -> Tensor:  # -> (64,)
    """Return what `RowStorage.id_check` holds: the number of writes, and numbers from it and the hash of the ids."""
    writes &= ID_CHECK_MASK
    mixed = (writes * 0x9E3779B1 ^ (id_hash & ID_CHECK_MASK) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF
    check = ID_CHECK_PATTERN + ((mixed ^ (mixed >> 13)) & ID_CHECK_MASK)
    check[0] = writes
    return check


def _hash(slots: Tensor, ids: Tensor) -> int:  # (m,), (m,) on one device
    """Sum up hashes of rows' slots and ids."""
    mixed = slots * -7046029254386353131 + ids * -4417276706812531889
    mixed = (mixed ^ (mixed >> 31)) * -7723592293110705685
    return int(((mixed ^ (mixed >> 29)) & ID_CHECK_MASK).sum())


def check_largest(ids: Tensor) -> None:
    if len(ids) and int(ids.max()) > MAX_ID:
        raise ArgumentError(f"ids: expected ids of at most {MAX_ID}, got {int(ids.max())}")
