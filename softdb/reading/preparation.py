"""Preparation of a search: the index follows the rows first."""

from __future__ import annotations

import warnings

from torch import Tensor

from softdb._checks import check_finite
from softdb.index.manager import IndexManager
from softdb.table.table import Table

__all__ = ["SearchPreparation"]


class SearchPreparation:
    """Has the index follow the rows, as `softdb.table.access.Access.reading` wants it for a search.

    Args:
        table: The rows.
        index: Their index.
        query: What is searched, (..., key_dim).
        k: The number of candidates.
    """

    def __init__(self, table: Table, index: IndexManager, query: Tensor, k: int | None) -> None:
        self._table, self._index, self._query, self._k = table, index, query, k

    def is_done(self) -> bool:
        """Whether searches find the rows as they are."""
        table = self._table
        if table.substituted_tensors():  # which are searched exactly
            return True
        return self._index.is_current(table.rows) and not self._index.has_stale_sample(table.keys)

    def run(self) -> None:
        """Let the index follow the rows."""
        table, index = self._table, self._index
        if table.substituted_tensors():
            return
        if index.is_current(table.rows) and index.has_stale_sample(table.keys):
            table.rows.mark_updated()
            if not table.has_warned_of_writes:
                table.has_warned_of_writes = True
                warnings.warn(
                    "keys were written to by .data or numpy, which torch does not count, so the index was out of date; "
                    "all rows have been compared with it now. Call store.touch(ids) after such writes",
                    stacklevel=2,
                )
        if not index.is_current(table.rows):
            check_finite("query", self._query)  # before the index is tuned by it
            query = self._query.reshape(-1, self._query.shape[-1])
            index.update(table.rows, table.keys.detach(), query, self._k or 1)
