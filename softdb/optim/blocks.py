"""Blocks of rows that an optimizer step works on, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.pending_checks import is_deferred
from softdb.table.storage import RowStorage

__all__ = ["BlockSizes", "RowBlock", "iterate_blocks"]


@dataclass(frozen=True)
class BlockSizes:
    """Block size of an optimizer step, in elements.

    Attributes:
        cpu: Elements per block on a CPU. A block fits in the cache and is large enough for two threads.
        other: Elements per block on other devices.
    """

    cpu: int = 2**16
    other: int = 2**24

    def rows_per_block(self, rows: Tensor) -> int:
        """Return the number of ``rows`` per block, at least 1."""
        numbers = self.cpu if rows.device.type == "cpu" else self.other
        return max(1, numbers // max(1, rows[:1].numel()))


def iterate_blocks(
    slots: Tensor | None, table: RowStorage | None, length: int, count: int
) -> Iterator[tuple[slice | Tensor, slice | Tensor]]:
    """Yield blocks of at most ``count`` rows to update.

    Args:
        slots: Slots of the rows to update; None for all live rows, on a GPU for all rows.
        table: The storage of the rows, if a store owns them.
        length: Number of rows of the Parameter.
        count: Maximum number of rows per block.

    Yields:
        The block's rows in the Parameter, and its positions in tensors with one entry per updated row.
    """
    if slots is not None:
        for first in range(0, len(slots), max(1, count)):
            place = slice(first, first + count)
            yield slots[place], place
        return
    # The host would have to wait for the number of live rows on a GPU. There a block has inactive rows.
    live = None if table is None or is_deferred(table.ids) else table.live_mask()
    used = length if table is None else table.used
    for first in range(0, used, max(1, count)):
        block = slice(first, min(first + count, used))
        if live is None or bool(live[block].all()):
            yield block, block
        else:
            some = live[block].nonzero().squeeze(-1) + first
            yield some, some


class RowBlock:
    """Block of rows that are taken from several tables and put back.

    Put the rows of one table back before taking those of the next, while they are still in the cache.

    Args:
        rows: Slots of the rows.
        capacity: Maximum number of rows per block.
        buffers: Memory that all blocks of a step share, by table. Reuse avoids the page faults of new memory.
        active: Which rows to put back, (m,) bool; None for all. Others keep their contents.
    """

    def __init__(
        self, rows: slice | Tensor, capacity: int, buffers: dict[int, Tensor], active: Tensor | None = None
    ) -> None:
        self._rows = rows
        self._active = active
        self._capacity = capacity
        self._buffers = buffers

    def take(self, table: Tensor) -> Tensor:
        """Return the rows of ``table``: a view if they are a slice, otherwise a copy.

        A slice with inactive rows is copied, too.
        """
        if isinstance(self._rows, slice):
            return table[self._rows] if self._active is None else table[self._rows].clone()
        return torch.index_select(table, 0, self._rows, out=self._buffer(id(table), table, len(self._rows)))

    def put(self, table: Tensor, rows: Tensor) -> None:
        """Write rows that were taken from ``table`` back to it."""
        if self._active is not None:
            old = table[self._rows] if isinstance(self._rows, slice) else table.index_select(0, self._rows)
            rows = torch.where(self._active.view(-1, *[1] * (rows.dim() - 1)), rows, old)
        if not isinstance(self._rows, slice):
            table.index_copy_(0, self._rows, rows)
        elif self._active is not None:
            table[self._rows] = rows

    def spare(self, rows: Tensor) -> Tensor:
        """Return scratch memory of the size of ``rows``, which were taken and put back.

        If ``rows`` are a copy, their memory is reused.
        """
        return self._buffer(0, rows, len(rows)) if isinstance(self._rows, slice) else rows

    def _buffer(self, key: int, like: Tensor, length: int) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(self._capacity, *like.shape[1:])
        return self._buffers[key][:length]
