"""`Ring`: the past tokens of a `ContextMemory` without ``k``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softdb.errors import StaleReadError
from softdb.functional import soft_read
from softdb.layers.segments import (
    SEGMENT_NAMES,
    Segment,
    check_segment,
    copy_segment,
    load_count,
    map_segment,
    new_segment,
    no_tokens,
    select_sequences,
)
from softdb.reading.result import Read
from softdb.transforms import is_active

__all__ = ["Ring"]


@dataclass
class WriteCount:
    """Count of the tokens written to the tables of a `Ring`.

    Each copy of the tables has its own count, so that backward detects writes to the tables that its read used.
    """

    written: int


class Ring:
    """Ring buffer of the last tokens of every sequence; reads attend to all of them.

    Token t of a sequence, counted from 0, is stored in row ``t % rows``.

    Attributes:
        tables: Keys, values and documents, (batch, rows, ...). Tokens of document -1 are hidden.
        written: Number of tokens of each sequence that have been written.
        count: The number of tokens that have been written to ``tables``.
    """

    required_names = frozenset((*SEGMENT_NAMES, "written"))

    def __init__(self, rows: int, key_dim: int, value_dim: int) -> None:
        self.rows, self.widths = rows, (key_dim, value_dim)
        self.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.count = WriteCount(self.written)  # Older pickles lack it.

    def new_empty(self) -> Ring:
        """Return an empty ring of the same shape."""
        return Ring(self.rows, *self.widths)

    def accepts_name(self, name: str) -> bool:
        """Return whether a state may have an entry of this name."""
        return name in self.required_names

    def clear(self) -> None:
        """Forget everything."""
        self._set_tables(None, 0)

    def _set_tables(self, tables: Segment | None, written: int) -> None:
        """Use other tables, with the tokens up to ``written``."""
        self.tables, self.written, self.count = tables, written, WriteCount(written)

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first segment."""
        return 0 if self.tables is None else len(self.tables[0])

    def forget(self, indices: Tensor) -> None:
        """Forget the tokens of the sequences at ``indices`` in the batch."""
        if self.tables is not None:
            self.tables[2][indices.to(self.tables[2].device)] = -1

    def select(self, indices: Tensor) -> None:
        """Replace the sequences by those at ``indices``, in new tables."""
        if self.tables is not None:
            self._set_tables(select_sequences(self.tables, indices), self.written)

    def crop(self, length: int) -> bool:
        """Forget all tokens but the first ``length``, fewer than there are.

        The tables are copied: later tokens overwrite the rows of the dropped ones, but the backward of an earlier read
        may need these rows.

        Returns:
            Whether reads still include rows of dropped tokens, so that they have to be hidden by document -1.
        """
        tables, is_hidden = self.tables, self.written > self.rows
        if tables is not None:
            tables = map_segment(torch.clone, tables)
            dropped = torch.arange(max(length, self.written - self.rows), self.written) % self.rows
            tables[2][:, dropped.to(tables[2].device)] = -1
        self._set_tables(tables, length)
        return is_hidden

    def list_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return numbers, keys and values of the tokens of document 0 of sequence 0."""
        if self.tables is None:
            return no_tokens(self.widths)
        keys, values, documents = map_segment(lambda table: table[0, : self.written], self.tables)
        rows = (documents == 0).nonzero().squeeze(-1)
        last = self.written - 1
        return last - (last - rows) % self.rows, keys[rows], values[rows]

    def write(self, segment: Segment) -> None:
        """Write the tokens of a segment over the oldest ones."""
        batch, count = segment[2].shape
        tables = self.tables
        if tables is None:
            tables = new_segment(batch, self.rows, self.widths, segment[0])
            self._set_tables(tables, self.written)
        if count > self.rows:
            self.written += count - self.rows
            count, segment = self.rows, map_segment(lambda part: part[:, -self.rows :], segment)
        first = self.written % self.rows
        before_end = min(count, self.rows - first)
        for table, part in zip(tables, segment, strict=True):
            # Write through .data, which torch does not detect. Otherwise backward of an earlier read would raise after
            # any write. That backward needs only the rows that it read, and `_check_unchanged` checks exactly those.
            table.data[:, first : first + before_end] = part[:, :before_end]
            table.data[:, : count - before_end] = part[:, before_end:]
        self.written += count
        self.count.written = self.written

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        """Read the tokens of each query's document; None if there are no tokens."""
        if self.tables is None or self.written == 0:
            return None
        tables = map_segment(torch.clone, self.tables) if is_active() else self.tables
        keys, values, stored = (table[:, None, : self.written] for table in tables)
        mask = None
        if documents is not None:
            mask = (stored.unsqueeze(-2) == documents[:, None, :, None]) & (stored.unsqueeze(-2) >= 0)
        read = soft_read(queries, keys, values, mask=mask)
        if is_active():  # The tables are copies, so no write changes them.
            return read
        check = partial(_check_unchanged, self.count, max(self.written, self.rows))
        for tensor in (read.values, read.lse):
            if tensor.requires_grad:
                tensor.register_hook(check)
        return read

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor with a function."""
        if self.tables is not None:
            tables = map_segment(function, self.tables)
            # If the device and dtype stay the same, so do the tables, and later writes still change their count.
            is_moved = any(new.data_ptr() != old.data_ptr() for new, old in zip(tables, self.tables, strict=True))
            self.tables, self.count = tables, WriteCount(self.written) if is_moved else self.count

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the tensors to save; empty ones have the dtype and device of ``like``."""
        tables = self.tables or new_segment(0, self.rows, self.widths, like)
        saved = dict(zip(SEGMENT_NAMES, tables, strict=True))
        return saved | {"written": torch.tensor(self.written, dtype=torch.int64, device=tables[0].device)}

    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> bool:
        """Load a state; return whether a token may have a document other than 0."""
        written = load_count(state, name, 0)
        check_segment(state, name, self.rows if len(state["documents"]) else None, self.widths)
        tables = copy_segment(state, like)
        self._set_tables(tables if len(tables[0]) else None, written)
        return bool((tables[2] != 0).any())


def _check_unchanged(count: WriteCount, limit: int, gradient: Tensor) -> None:
    """Raise if tokens of a read have been overwritten in the tables that it used.

    The oldest token of the read is overwritten once more than ``limit`` tokens have been written in total.
    """
    if count.written > limit:
        raise StaleReadError(
            "backward: expected the tokens that the read used, got tokens that later segments have overwritten; "
            "call backward() before the next segment, or make the layer with more rows"
        )
