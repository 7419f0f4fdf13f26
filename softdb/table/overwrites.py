"""Writes by other code to the row buffers, keys and values of a store."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from softdb._checks import list_ids
from softdb.errors import ForeignWriteError
from softdb.table.average_source import Tensors
from softdb.table.id_check import AVERAGED_IDS, INVALID_CHECK, compute_id_check, hash_rows, is_same_hash
from softdb.table.storage import CHANGE_COLUMNS, RowStorage
from softdb.table.versions import Differences

__all__ = [
    "Overwrites",
    "check_ids_unchanged",
    "check_substituted_buffers",
    "compare_versions",
    "follow_overwrites",
    "is_unchanged",
    "observe_average",
    "observe_listing",
    "record_versions",
    "warn_of_zero_start",
]


class Overwrites(NamedTuple):
    """Effects of a write by other code to the row buffers.

    Attributes:
        zero_started: Slots that held no row before the write. Their averages started from zero.
        rows_differ: Whether the slots hold other rows now.
    """

    zero_started: Tensor
    rows_differ: bool


def record_versions(rows: RowStorage, tables: Mapping[str, Tensor], substituted: frozenset[str] = frozenset()) -> None:
    """Record every write so far to ``tables`` and row buffers as processed.

    The records of ``substituted`` names are kept as they are.
    """
    rows.recorded.record({name: getattr(rows, name) for name in rows.watched} | dict(tables), substituted)


def is_unchanged(rows: RowStorage, tables: Mapping[str, Tensor]) -> bool:
    """Return whether no other code has written to ``tables`` or row buffers."""
    count = len(tables) + len(rows.watched)
    return rows.recorded.are_current(tables, rows._buffers, count) and not _is_overwritten_uncounted(rows)


def _is_overwritten_uncounted(rows: RowStorage) -> bool:
    """Return whether ``.data`` of ``next_id`` or ``id_check`` was written to.

    Buffers on other devices than the CPU are not compared, since that would synchronize with the device.
    """
    next_id, id_check = rows._buffers["next_id"], rows._buffers["id_check"]
    if next_id is None or id_check is None or not next_id.is_cpu or not id_check.is_cpu:
        return False
    return next_id.item() != rows.first_new_id or not torch.equal(id_check, rows.expected_check)


def compare_versions(rows: RowStorage, tables: Mapping[str, Tensor]) -> Differences:
    """Return the ``tables`` and row buffers that other code has written or replaced."""
    written, replaced = rows.recorded.compare({name: getattr(rows, name) for name in rows.watched} | dict(tables))
    if not replaced & {"ids", "next_id", "id_check"} and _is_overwritten_uncounted(rows):
        written |= {"ids", "next_id"}
        if not torch.equal(rows.id_check.cpu(), rows.expected_check):
            written |= {"id_check"}
    return Differences(written, replaced)


def check_substituted_buffers(rows: RowStorage, names: Iterable[str]) -> None:
    """Raise unless substituted buffers hold the same ids as those of the table.

    `torch.func.functional_call` substitutes buffers.
    """
    for name in names:
        own = rows.recorded.tensor(name)
        if name in ("ids", "next_id") and (own is None or not torch.equal(own, getattr(rows, name))):
            raise ForeignWriteError(
                f"rows.{name}: expected the store's own buffer or a copy of it, got another; pass functional_call "
                "the Parameters only, or buffers of the same rows"
            )


def follow_overwrites(rows: RowStorage, written: frozenset[str]) -> Overwrites:
    """Derive all state again from buffers that other code has written to.

    In-place loading (torch.distributed.checkpoint), copies of another store's buffers (AveragedModel) and broadcasts
    (DistributedDataParallel) write complete sets of rows and are accepted. Averaged ids are rejected.

    Raises:
        ForeignWriteError: The buffers do not describe valid rows, or an average mixes two rows.
    """
    copied = "id_check" in written  # A state_dict does not contain this buffer.
    if copied:
        observe_average(rows)
    if len(rows.average.mixed):
        raise _mixed_rows(rows.average.mixed)
    _check_overwritten(rows, copied=copied)
    if copied:
        rows.writes = max(rows.writes, int(rows.id_check[0]))
        for name in CHANGE_COLUMNS:  # They contain versions of the other store.
            if getattr(rows, name).is_contiguous():
                rows.writable_buffer(name).zero_()
    ids = rows.ids.cpu()
    live = (ids >= 0).nonzero().squeeze(-1)
    same = len(live) == len(rows) and bool((rows.slots.find(ids[live]) == live).all())
    if same:
        rows.derive_counters(live, ids[live])
    else:
        rows.derive()
    return Overwrites(rows.average.pop_zero_started(), not same)


def _check_overwritten(rows: RowStorage, *, copied: bool) -> None:
    """Raise unless the buffers describe valid rows.

    Args:
        rows: The row storage.
        copied: Whether all buffers were written to, including the checksum.
    """
    ids = rows.ids.cpu()
    named = ids[ids >= 0]
    fits = not copied or _matches_check(rows)
    whole = len(ids) == 0 or int(ids.min()) >= -1
    if fits and whole and len(named.unique()) == len(named) and int(rows.next_id) >= 0:
        return
    raise ForeignWriteError(AVERAGED_IDS)


def _matches_check(rows: RowStorage) -> bool:
    """Return whether the ids match the checksum; an average of ids does not."""
    ids, check = rows.ids.cpu(), rows.id_check.cpu()
    slots = (ids >= 0).nonzero().squeeze(-1)
    return torch.equal(check, compute_id_check(hash_rows(slots, ids[slots]), int(check[0])))


def check_ids_unchanged(rows: RowStorage) -> None:
    """Raise if the ids were changed, including by writes to ``.data``."""
    ids = rows.ids.cpu()
    slots = (ids >= 0).nonzero().squeeze(-1)
    if not is_same_hash(hash_rows(slots, ids[slots]), rows.id_hash):
        raise ForeignWriteError(AVERAGED_IDS)


def observe_listing(table: Tensors) -> None:
    """Check for mixed averages when the tensors of ``table`` are listed.

    torch lists them before each update of an average.

    Raises:
        ForeignWriteError: An average of keys and values mixes two rows.
    """
    rows: RowStorage = table.rows
    observe_average(rows)
    source = rows.average.source  # Another thread may end the watch.
    if source is None:
        return
    found = source.observe(table)
    if len(found.ids):
        rows.average.mixed = torch.cat([rows.average.mixed, found.ids])
        rows.writable_buffer("id_check").fill_(INVALID_CHECK)  # Later uses of the average raise too.
    if len(source.mixed):
        raise _mixed_rows(source.mixed)
    if found.zero_started:
        warn_of_zero_start(found.zero_started)


def _mixed_rows(ids: Tensor) -> ForeignWriteError:
    """Create the error for an average that mixes rows."""
    return ForeignWriteError(
        f"the average mixes two rows in each of {len(ids)} slots (ids {list_ids(ids)}), since rows of the averaged "
        "store were replaced between two updates; average by id with softdb.optim.update_average(average, model, "
        "decay), and load a state_dict to go on"
    )


def warn_of_zero_start(count: int) -> None:
    """Warn about rows whose average started from zero."""
    warnings.warn(
        f"average: expected averages that start from the rows, got {count} that started from zero, since the averaged "
        "store added rows to empty slots between two updates; use softdb.optim.update_average(average, model, decay), "
        "which averages by id",
        stacklevel=3,
    )


def observe_average(rows: RowStorage) -> None:
    """Check whether the last update of an average mixed rows."""
    if rows.average.is_outdated(rows.id_check):
        rows.average.observe(rows.slot_rows, has_whole_ids=_matches_check(rows))
        if len(rows.average.mixed):
            # A store to which these buffers are copied must raise, too.
            rows.writable_buffer("id_check").fill_(INVALID_CHECK)
