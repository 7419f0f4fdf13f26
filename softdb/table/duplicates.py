"""Sum the duplicates of row-sparse gradients without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowSums", "sum_duplicates"]


class RowSums(NamedTuple):
    """Sums of the entries of each row.

    The number of distinct rows is known only to the device, so that all tensors have an element for each entry.

    Attributes:
        rows: Row of each entry, (m,) ascending, with duplicates.
        place: Place of the sum of each entry's row in ``sums``, (m,).
        sums: Sums, (m, ...): those of the distinct rows, followed by zeros.
    """

    rows: Tensor
    place: Tensor
    sums: Tensor


def sum_duplicates(rows: Tensor, values: Tensor) -> RowSums:  # (m,), (m, ...)
    """Sum the ``values`` of equal ``rows``.

    Equal to ``coalesce()`` of a COO tensor, but the host does not wait for the number of distinct rows. The result does
    not depend on the order in which the device runs its threads.
    """
    ordered, order = rows.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
    place = is_first.cumsum(0).sub_(1)
    sums = torch.zeros_like(values)
    # On CUDA, index_add_ uses atomics, whose order varies between runs, and index_put_ sorts.
    sums.index_put_((place,), values.index_select(0, order), accumulate=True)
    return RowSums(ordered, place, sums)
