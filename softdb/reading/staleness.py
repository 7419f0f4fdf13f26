"""The staleness check: whether the rows that a read used are unchanged when its gradients come back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softdb._checks import list_ids
from softdb.errors import StaleReadError
from softdb.table.changes import version_of
from softdb.table.storage import RowStorage

__all__ = ["StalenessCheck"]


class StalenessCheck:
    """What a read saw, to be checked again before its backward.

    Args:
        table: The rows that were read.
        used: Which slots the read may have used: a bool mask over the first slots, a tensor of slots (-1 is
            padding), or None for every slot that held a row.
        lent: Tensors that were read in the place of the table's own, which no change to its rows concerns.
        own: Whether tensors of the table's own were read.
    """

    def __init__(
        self, table: RowStorage, used: Tensor | None, lent: Sequence[Tensor] = (), *, own: bool = True
    ) -> None:
        self._table = table if own else None
        self._version = table.version
        self._first = table.used
        self._used = table.live() if used is None else used
        self._lent = [(tensor, version_of(tensor)) for tensor in lent]

    def check(self) -> None:
        """Raise `StaleReadError` if a row that the read used has changed since."""
        if any(version_of(tensor) != version for tensor, version in self._lent):
            raise StaleReadError(
                "keys or values that were put in the place of the store's own were written to between this read and "
                "its backward, so its gradients would be wrong; call backward() before writing to them"
            )
        if self._table is None or self._table.version == self._version:
            return
        changed = self._table.changed_since(self._version)
        changed = changed[changed < self._first]
        if self._used is not None:
            if self._used.dtype == torch.bool:
                changed = changed[self._used[changed]]
            else:
                changed = changed[torch.isin(changed, self._used)]
        if len(changed):
            raise StaleReadError(
                f"{len(changed)} of the rows that this read used (slots {list_ids(changed)}) were changed, deleted or "
                "moved by an optimiser before its backward, so their gradients would be wrong; call backward() "
                "before writing to the store, or read again"
            )
