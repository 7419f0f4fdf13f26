"""Keys and values as a read finds them, and the rows gathered from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.kernels.gather import GatherIndex, gather_rows

__all__ = ["Tables", "choose", "one_hot_first"]


@dataclass(frozen=True)
class Tables:
    """Keys and values to read from, N rows for each of G groups of queries; row n of group g lies at ``g * N + n``.

    Attributes:
        keys, values: (G N, width).
        groups: G.
        sparse: Whether gathered rows get row-sparse gradients.
    """

    keys: Tensor
    values: Tensor
    groups: int = 1
    sparse: bool = False

    def place(self, rows: Tensor) -> Tensor:  # (M, k) row numbers -> (M, k) places in the tables
        """Return where the rows of each query's group lie in the tables."""
        if self.groups <= 1:
            return rows
        first = torch.arange(self.groups, device=rows.device) * (len(self.keys) // self.groups)
        first = first.repeat_interleave(len(rows) // self.groups).unsqueeze(-1)
        return torch.where(rows < 0, rows, rows + first)

    def gather_keys(self, places: GatherIndex, dtype: torch.dtype) -> Tensor:
        """Return the keys at some places."""
        return gather_rows(self.keys, places, dtype, sparse=self.sparse)

    def gather_values(self, places: GatherIndex, dtype: torch.dtype) -> Tensor:
        """Return the values at some places."""
        return gather_rows(self.values, places, dtype, sparse=self.sparse)


def choose(tables: Tables, places: GatherIndex, dtype: torch.dtype) -> Tensor:  # (M, k) -> (M, dv)
    """The value of each query's best row, 0 where there is none."""
    first = places.index[:, :1]
    if len(tables.values) == 0:
        return tables.values.new_zeros(len(first), tables.values.shape[-1], dtype=dtype)
    return gather_rows(tables.values.detach(), GatherIndex(first), dtype, sparse=False).squeeze(1)


def one_hot_first(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights of 1 for the first row of each query, 0 for the others and where there is none."""
    weights = torch.zeros_like(rows, dtype=dtype)
    weights[..., 0] = (rows[..., 0] >= 0).to(dtype)
    return weights
