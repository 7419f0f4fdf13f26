"""Buffers of rows with another number of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.table.slots import resized
from softdb.table.storage import CHANGE_COLUMNS, RowStorage

__all__ = ["change_columns", "resized_buffers"]


def resized_buffers(rows: RowStorage, capacity: int) -> dict[str, Tensor]:
    """Return the buffers with room for ``capacity`` rows; memory may run out before they are installed."""
    buffers = {name: resized(getattr(rows, name), capacity) for name in (*CHANGE_COLUMNS, *rows.columns)}
    return buffers | {"ids": resized(rows.ids, capacity, fill=-1)}


def change_columns(capacity: int, device: torch.device, *, expanded: bool = False) -> dict[str, Tensor]:
    """Return buffers of rows that have never changed; ``expanded`` ones take no memory, and cannot be written to."""
    never = torch.zeros(1 if expanded else capacity, dtype=torch.int64, device=device)
    return {name: never.expand(capacity) if expanded else never.clone() for name in CHANGE_COLUMNS}
