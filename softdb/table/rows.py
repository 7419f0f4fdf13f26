"""Copies of rows, and their usage counters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from softdb._checks import Ids, check_choice, check_ids, check_int, describe
from softdb.errors import FieldError, ShapeError
from softdb.table.storage import RowStorage
from softdb.table.table import Table
from softdb.table.usage import COUNTER_COLUMNS, Usage, new_counters

__all__ = ["Missing", "Rows", "check_row_ids", "contains", "copy_field", "copy_rows", "copy_usage", "set_tracking"]

Missing = Literal["error", "pad"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Copies of rows, in the requested order, as `SoftKVStore.get` returns them.

    Attributes:
        keys: (..., key_dim), where ... is the shape of the ids.
        values: (..., value_dim).
        fields: Field name to int64 (...,).
    """

    keys: Tensor
    values: Tensor
    fields: dict[str, Tensor]


def contains(rows: RowStorage, id: object) -> bool:
    """Return whether ``id`` is an integer that is the id of a row."""
    if isinstance(id, (Tensor, np.ndarray)):
        if id.size != 1 if isinstance(id, np.ndarray) else id.numel() != 1:
            raise ShapeError(f"id: expected one id, got shape {tuple(id.shape)}; test them with torch.isin")
        id = id.item()
    if isinstance(id, (bool, np.bool_)) or not hasattr(id, "__index__"):
        return False
    number = id.__index__()
    return 0 <= number < 2**63 and int(rows.slots.find(torch.tensor([number], device="cpu"))) >= 0


def check_row_ids(ids: Ids, missing: Missing) -> Tensor:
    """Convert ids of any shape to an int64 tensor; -1 is allowed if ``missing="pad"``."""
    check_choice("missing", missing, get_args(Missing))
    return check_ids("ids", ids, repeats=True, padding=missing == "pad")


def copy_rows(table: Table, ids: Tensor, missing: Missing) -> Rows:  # (*shape,) int64
    """Copy the rows with the given ids.

    Args:
        table: The table.
        ids: The ids, as `check_row_ids` returns them.
        missing: "error" raises for unknown ids, "pad" copies zeros, and -1 in fields.
    """
    rows = table.rows
    slots = rows.slots.slots_of("ids", ids) if missing == "error" else rows.slots.find_padded(ids)
    table.check_not_sharded()
    fields = {name: gather_padded(getattr(rows, f"field_{name}"), slots, -1) for name in rows.fields}
    keys, values = (gather_padded(tensor.detach(), slots, 0) for tensor in (table.keys, table.values))
    return Rows(keys, values, fields)


def copy_field(rows: RowStorage, ids: Tensor, name: str, fill: int) -> Tensor:  # (*shape,) -> (*shape,)
    """Copy one field of the rows with the given ids; unknown ids and -1 give ``fill``."""
    if name not in rows.fields:
        known = ", ".join(map(repr, rows.fields)) or "none"
        raise FieldError(f"name: expected one of this store's fields ({known}), got {describe(name)}")
    fill = check_int("fill", fill, least=-(2**63))
    return gather_padded(getattr(rows, f"field_{name}"), rows.slots.find_padded(ids), fill)


def gather_padded(column: Tensor, slots: Tensor, fill: int) -> Tensor:  # (n, *rest), (*shape,) -> (*shape, *rest)
    """Copy the entries of ``column`` at ``slots``; ``fill`` at slot -1."""
    shape, flat = (*slots.shape, *column.shape[1:]), slots.flatten()
    found = flat >= 0
    if bool(found.all()):
        return column.index_select(0, flat.to(column.device)).reshape(shape)
    padded = column.new_full((len(flat), *column.shape[1:]), fill)
    padded[found.to(column.device)] = column.index_select(0, flat[found].to(column.device))
    return padded.reshape(shape)


def copy_usage(rows: RowStorage) -> Usage:
    """Copy the usage counters of all rows, in slot order."""
    if rows.ids.is_meta:
        return Usage(rows.reads.new_empty(len(rows)), rows.weight.new_empty(len(rows)))
    slots = rows.live_slots()
    with rows.access.counter_lock:
        return Usage(rows.reads[slots], rows.weight[slots])


def set_tracking(table: Table, enabled: bool) -> None:
    """Start usage counters at zero, or drop them; without effect if already done.

    The caller holds the exclusive lock.
    """
    rows = table.rows
    if rows.track_usage == enabled:
        return
    counters = new_counters(rows.capacity, rows.ids.device) if enabled else ()
    for name, counter in zip(COUNTER_COLUMNS, counters, strict=False):
        rows.register_buffer(name, counter)
    for names in ("optional", "columns", "saved"):
        kept = tuple(name for name in getattr(rows, names) if name not in COUNTER_COLUMNS)
        setattr(rows, names, (*kept, *COUNTER_COLUMNS) if enabled else kept)
    rows.track_usage = enabled
    if not enabled:
        for name in COUNTER_COLUMNS:
            delattr(rows, name)
    table.config = replace(table.config, track_usage=enabled)
