"""Preparation of a top-k read: update the index."""

from __future__ import annotations

import warnings

from torch import Tensor

from softdb._checks import check_finite
from softdb.index.manager import IndexManager
from softdb.pending_checks import is_deferred
from softdb.table.table import Table

__all__ = ["SearchPreparation"]


class SearchPreparation:
    """Update of the index that a search needs before it runs.

    `softdb.table.access.Access.reading` calls its methods.

    Args:
        table: The rows.
        index: The index over the rows.
        query: Queries of the search, (..., key_dim).
        k: Number of candidates.
    """

    def __init__(self, table: Table, index: IndexManager, query: Tensor, k: int | None) -> None:
        self._table, self._index, self._query, self._k = table, index, query, k

    def is_done(self) -> bool:
        """Return whether the index is up to date."""
        table = self._table
        if table.substituted_tensors():  # substituted tensors are searched exactly
            return True
        return self._index.is_current(table.rows) and not self._index.has_stale_sample(table.keys)

    def run(self) -> None:
        """Update the index from the rows."""
        table, index = self._table, self._index
        if table.substituted_tensors():
            return
        if index.is_current(table.rows) and index.has_stale_sample(table.keys):
            table.rows.mark_updated()
            if not table.has_warned_of_writes:
                table.has_warned_of_writes = True
                warnings.warn(
                    "keys: expected writes that autograd records, got a write through .data or NumPy; the index was "
                    "stale, so all rows were compared with it; call store.touch(ids) after such a write",
                    stacklevel=2,
                )
        if not index.is_current(table.rows):
            if not is_deferred(self._query):  # The host would wait; the read itself checks the query, too.
                check_finite("query", self._query)  # before the index is tuned with the query
            query = self._query.reshape(-1, self._query.shape[-1])
            index.update(table.rows, table.keys.detach(), query, self._k or 1)
