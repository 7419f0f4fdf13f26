"""Resized copies of row buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.table.slots import resize
from softdb.table.storage import CHANGE_COLUMNS, RowStorage

__all__ = ["change_columns", "resize_buffers"]


def resize_buffers(rows: RowStorage, capacity: int) -> dict[str, Tensor]:
    """Copy the row buffers to ``capacity`` slots.

    The caller installs the copies once all are allocated, so that a failed allocation changes nothing.
    """
    buffers = {name: resize(getattr(rows, name), capacity) for name in (*CHANGE_COLUMNS, *rows.columns)}
    return buffers | {"ids": resize(rows.ids, capacity, fill=-1)}


def change_columns(capacity: int, device: torch.device, *, expanded: bool = False) -> dict[str, Tensor]:
    """Create change buffers of rows that have never changed.

    Args:
        capacity: The number of slots.
        device: The device of the buffers.
        expanded: Whether to expand one element, which takes no memory but is read-only.
    """
    zeros = torch.zeros(1 if expanded else capacity, dtype=torch.int64, device=device)
    return {name: zeros.expand(capacity) if expanded else zeros.clone() for name in CHANGE_COLUMNS}
