"""Writes that went round the store: into the buffers of its rows, or into its keys and values."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from softdb._checks import list_ids
from softdb.errors import ForeignWriteError
from softdb.table.average_source import Tensors
from softdb.table.id_check import AVERAGED, NO_CHECK, hash_rows, id_check_of, same_hash
from softdb.table.storage import CHANGE_COLUMNS, RowStorage
from softdb.table.versions import Differences

__all__ = [
    "Overwrites",
    "check_lent_buffers",
    "check_own_ids",
    "compare_versions",
    "follow_overwrites",
    "is_unchanged",
    "observe_average",
    "observe_listing",
    "record_versions",
    "warn_of_started",
]


class Overwrites(NamedTuple):
    """What something else wrote into the buffers.

    Attributes:
        started: Slots that held no row before that update, whose average began with zeros.
        rows_differ: Whether other rows lie in the slots now.
    """

    started: Tensor
    rows_differ: bool


def record_versions(rows: RowStorage, tables: Mapping[str, Tensor], lent: frozenset[str] = frozenset()) -> None:
    """Record that every write so far to ``tables`` and to the buffers is accounted for; not to ``lent`` ones."""
    rows.recorded.record({name: getattr(rows, name) for name in rows.watched} | dict(tables), lent)


def is_unchanged(rows: RowStorage, tables: Mapping[str, Tensor]) -> bool:
    """Whether nothing else has written to ``tables`` or the buffers, or replaced them."""
    count = len(tables) + len(rows.watched)
    return rows.recorded.are_current(tables, rows._buffers, count) and not _is_overwritten_uncounted(rows)


def _is_overwritten_uncounted(rows: RowStorage) -> bool:
    """Whether ``next_id`` or the check of ids was written to by ``.data``; not looked at on other devices."""
    next_id, id_check = rows._buffers["next_id"], rows._buffers["id_check"]
    if next_id is None or id_check is None or not next_id.is_cpu or not id_check.is_cpu:
        return False
    return next_id.item() != rows.first_new_id or not torch.equal(id_check, rows.expected_check)


def compare_versions(rows: RowStorage, tables: Mapping[str, Tensor]) -> Differences:
    """Return the names of ``tables`` and buffers that something else has written to, and of replaced ones."""
    written, replaced = rows.recorded.compare({name: getattr(rows, name) for name in rows.watched} | dict(tables))
    if not replaced & {"ids", "next_id", "id_check"} and _is_overwritten_uncounted(rows):
        written |= {"ids", "next_id"}
        if not torch.equal(rows.id_check.cpu(), rows.expected_check):
            written |= {"id_check"}
    return Differences(written, replaced)


def check_lent_buffers(rows: RowStorage, names: Iterable[str]) -> None:
    """Raise unless the buffers in the place of the table's own, as functional_call lends them, name its rows."""
    for name in names:
        own = rows.recorded.own(name)
        if name in ("ids", "next_id") and (own is None or not torch.equal(own, getattr(rows, name))):
            raise ForeignWriteError(
                f"rows.{name}: expected the store's own buffer or a copy of it, got another; pass functional_call "
                "the Parameters only, or buffers of the same rows"
            )


def follow_overwrites(rows: RowStorage, written: frozenset[str]) -> Overwrites:
    """Derive everything again from buffers that something else has written to.

    In-place loading (torch.distributed.checkpoint), copies of another store's buffers (AveragedModel) and broadcasts
    (DistributedDataParallel) are whole sets of rows. Averaged ids are not.

    Raises:
        ForeignWriteError: The buffers do not describe rows, or an average mixes two rows.
    """
    copied = "id_check" in written  # which is no part of a state_dict
    if copied:
        observe_average(rows)
    if len(rows.average.mixed):
        raise _mixed_rows(rows.average.mixed)
    _check_overwritten(rows, copied=copied)
    if copied:
        rows.writes = max(rows.writes, int(rows.id_check[0]))
        for name in CHANGE_COLUMNS:  # of another store's versions
            if getattr(rows, name).is_contiguous():
                rows.own(name).zero_()
    ids = rows.ids.cpu()
    live = (ids >= 0).nonzero().squeeze(-1)
    same = len(live) == len(rows) and bool((rows.slots.find(ids[live]) == live).all())
    if same:
        rows.derive_counters(live, ids[live])
    else:
        rows.derive()
    return Overwrites(rows.average.take_started(), not same)


def _check_overwritten(rows: RowStorage, *, copied: bool) -> None:
    """Raise unless the buffers describe rows; ``copied`` if all of them have been written to."""
    ids = rows.ids.cpu()
    named = ids[ids >= 0]
    slots = (ids >= 0).nonzero().squeeze(-1)
    check = rows.id_check.cpu()
    fits = not copied or torch.equal(check, id_check_of(hash_rows(slots, named), int(check[0])))
    whole = len(ids) == 0 or int(ids.min()) >= -1
    if fits and whole and len(named.unique()) == len(named) and int(rows.next_id) >= 0:
        return
    raise ForeignWriteError(AVERAGED)


def check_own_ids(rows: RowStorage) -> None:
    """Raise unless the ids are those that were written last: by ``.data`` others may have come unnoticed."""
    ids = rows.ids.cpu()
    slots = (ids >= 0).nonzero().squeeze(-1)
    if not same_hash(hash_rows(slots, ids[slots]), rows.id_hash):
        raise ForeignWriteError(AVERAGED)


def observe_listing(table: Tensors) -> None:
    """Find what averages have mixed, whenever the tensors of ``table`` are listed: as they are before each update.

    Raises:
        ForeignWriteError: An average of keys and values alone mixes two rows.
    """
    rows: RowStorage = table.rows
    observe_average(rows)
    if rows.average.source is None:
        return
    found = rows.average.source.observe(table)
    if len(found.ids):
        rows.average.mixed = torch.cat([rows.average.mixed, found.ids])
        rows.own("id_check").fill_(NO_CHECK)  # so that the next use of the average raises, too
    if len(rows.average.source.mixed):
        raise _mixed_rows(rows.average.source.mixed)
    if found.started:
        warn_of_started(found.started)


def _mixed_rows(ids: Tensor) -> ForeignWriteError:
    """Return the error for an average that mixes rows with others."""
    return ForeignWriteError(
        f"the average mixes two rows in each of {len(ids)} slots (ids {list_ids(ids)}), since rows of the averaged "
        "store were replaced between two updates; average by id with softdb.optim.update_average(average, model, "
        "decay), and load a state_dict to go on"
    )


def warn_of_started(count: int) -> None:
    """Warn of rows whose average began with zeros."""
    warnings.warn(
        f"{count} rows came into empty slots of an averaged store between two updates, so their averages began with "
        "zeros; softdb.optim.update_average(average, model, decay) averages by id and begins with the rows themselves",
        stacklevel=3,
    )


def observe_average(rows: RowStorage) -> None:
    """Find slots in which the last update of an average mixed what they held before with another row."""
    if rows.average.is_outdated(rows.id_check):
        rows.average.observe(rows.tenants)
        if len(rows.average.mixed):
            rows.own("id_check").fill_(NO_CHECK)  # so that a store that these buffers are copied to notices, too
