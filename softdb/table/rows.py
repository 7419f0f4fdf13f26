"""Copies of rows and of their usage counters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.table.storage import RowStorage
from softdb.table.table import Table
from softdb.table.usage import Usage

__all__ = ["Rows", "contains", "copy_rows", "copy_usage"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Copies of rows, in the requested order, as `SoftKVStore.get` returns them.

    Attributes:
        keys: (m, key_dim).
        values: (m, value_dim).
        fields: Field name to int64 (m,).
    """

    keys: Tensor
    values: Tensor
    fields: dict[str, Tensor]


def contains(rows: RowStorage, id: object) -> bool:
    """Return whether ``id`` is an integer that is the id of a row."""
    if isinstance(id, Tensor) and id.numel() == 1:
        id = id.item()
    if isinstance(id, bool) or not hasattr(id, "__index__"):
        return False
    number = id.__index__()
    return 0 <= number < 2**63 and int(rows.slots.find(torch.tensor([number], device="cpu"))) >= 0


def copy_rows(table: Table, ids: Tensor) -> Rows:  # (m,) int64
    """Copy the rows with the given ids, in the same order."""
    slots = table.rows.slots.slots_of("ids", ids).to(table.keys.device)
    table.check_not_sharded()
    row = table.rows.view(slots)
    fields = {name: row[name] for name in table.rows.fields}
    return Rows(table.keys.detach()[slots], table.values.detach()[slots], fields)


def copy_usage(rows: RowStorage) -> Usage:
    """Copy the usage counters of all rows, in slot order."""
    if rows.ids.is_meta:
        return Usage(rows.reads.new_empty(len(rows)), rows.weight.new_empty(len(rows)))
    slots = rows.live_slots()
    with rows.access.counter_lock:
        return Usage(rows.reads[slots], rows.weight[slots])
