"""Keys and values of a read, and rows gathered from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.kernels.gather import GatherIndex, gather_rows
from softdb.table.gradients import with_sparse_gradient

__all__ = ["Tables", "gather_best_value", "one_hot_first"]


@dataclass(frozen=True)
class Tables:
    """Keys and values of N rows for each of G groups of queries.

    Row n of group g is at position ``g * N + n``.

    Attributes:
        keys: Keys, (G N, key_dim).
        values: Values, (G N, value_dim).
        groups: Number of groups, G.
        sparse: Whether gathered rows get row-sparse gradients.
    """

    keys: Tensor
    values: Tensor
    groups: int = 1
    sparse: bool = False

    def place(self, rows: Tensor) -> Tensor:  # (M, k) row numbers -> (M, k) places in the tables
        """Convert row numbers of each query's group to positions in the tables."""
        if self.groups <= 1:
            return rows
        first = torch.arange(self.groups, device=rows.device) * (len(self.keys) // self.groups)
        first = first.repeat_interleave(len(rows) // self.groups).unsqueeze(-1)
        return torch.where(rows < 0, rows, rows + first)

    def zero(self, dtype: torch.dtype) -> Tensor:
        """Return 0, the sum of the tables if they have no rows, in their graph."""
        tables = [with_sparse_gradient(table) if self.sparse else table for table in (self.keys, self.values)]
        return sum((table.sum(dtype=dtype) for table in tables), torch.zeros((), dtype=dtype, device=self.keys.device))

    def gather_keys(self, places: GatherIndex, dtype: torch.dtype) -> Tensor:
        """Gather keys at ``places``."""
        return gather_rows(self.keys, places, dtype, sparse=self.sparse)

    def gather_values(self, places: GatherIndex, dtype: torch.dtype) -> Tensor:
        """Gather values at ``places``."""
        return gather_rows(self.values, places, dtype, sparse=self.sparse)


def gather_best_value(tables: Tables, places: GatherIndex, dtype: torch.dtype) -> Tensor:  # (M, k) -> (M, dv)
    """Gather the value of each query's first row; zeros where there is none."""
    first = places.index[:, :1]
    if len(tables.values) == 0:
        return tables.values.new_zeros(len(first), tables.values.shape[-1], dtype=dtype)
    return gather_rows(tables.values.detach(), GatherIndex(first), dtype, sparse=False).squeeze(1)


def one_hot_first(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Make weights of 1 for the first row of each query, and 0 elsewhere."""
    weights = torch.zeros_like(rows, dtype=dtype)
    weights[..., 0] = (rows[..., 0] >= 0).to(dtype)
    return weights
