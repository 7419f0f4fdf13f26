"""Checks of the invariants of a table, for tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from softdb.table.storage import CHANGE_COLUMNS, RowStorage
from softdb.table.table import Table

__all__ = ["check_invariants"]


def check_invariants(table: Table, more: Iterable[tuple[str, bool]]) -> None:
    """Raise a RuntimeError that names the violated invariants of a table.

    Args:
        table: The table.
        more: Further pairs of a claim and whether it holds.
    """
    broken = [claim for claim, holds in itertools.chain(_invariants(table), more) if not holds]
    if broken:
        raise RuntimeError(f"the store is inconsistent: expected that {'; that '.join(broken)}")


def _invariants(table: Table) -> Iterator[tuple[str, bool]]:
    """Yield each invariant of a table and whether it holds."""
    rows, live = table.rows, table.rows.ids >= 0
    for name, tensor in table.tensors().items():
        yield f"{name} have a row for each slot", tensor.shape == table.shape_of(name)
        yield f"{name} of slots without a row are zeros", bool((tensor.detach()[~live] == 0).all())
    yield "no write is unfinished", table.journal.is_empty
    yield from _invariants_of_rows(rows)


def _invariants_of_rows(rows: RowStorage) -> Iterator[tuple[str, bool]]:
    live, ids = (rows.ids >= 0).cpu(), rows.ids.cpu()
    named, slots = ids[live], live.nonzero().squeeze(-1)
    holes = (~live[: rows.used]).nonzero().squeeze(-1)
    buffers = [getattr(rows, name) for name in (*CHANGE_COLUMNS, *rows.columns)]
    is_found = bool((rows.slots.find(named) == slots).all()) and rows.slots.entries == len(rows)
    yield "every buffer has an entry for each slot", all(len(buffer) == rows.capacity for buffer in buffers)
    yield (
        "no row lies at or above the number of used slots",
        rows.used <= rows.capacity and not bool(live[rows.used :].any()),
    )
    yield "the holes are the used slots without an id", torch.equal(rows.free.all(), holes)
    yield "each id maps to its slot", is_found
    yield (
        "ids are below the next id",
        bool((named < rows.first_new_id).all()) and int(rows.next_id) == rows.first_new_id,
    )
    yield "no slot has a version after the current one", bool((rows.changed_at <= rows.version).all())
    if rows.clock.column is not None:
        readings = getattr(rows, rows.clock.column).cpu()[live]
        yield "readings are below the clock", bool((readings < rows.clock.now).all())
        yield "no two rows have equal readings", rows.evict != "oldest" or len(readings.unique()) == len(named)
