"""Which rows lie in the slots of a table at one time."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from softdb.table.changes import version_of

__all__ = ["Tenants"]


class Tenants(NamedTuple):
    """Which rows lie in the slots of a copied store.

    Attributes:
        ids, generation: Of each slot, (capacity,).
        version: The number of writes to the check of ids.
    """

    ids: Tensor
    generation: Tensor
    version: int

    @classmethod
    def of(cls, ids: Tensor, generation: Tensor, id_check: Tensor) -> Tenants:
        """Return copies."""
        return cls(ids.clone(), generation.clone(), version_of(id_check))
