"""Check the gradients of row optimizers, and select the rows to update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softdb.errors import DtypeError, ShapeError
from softdb.pending_checks import is_deferred
from softdb.table.duplicates import sum_duplicates
from softdb.table.gradients import coalesce
from softdb.table.storage import RowStorage

__all__ = ["RowGradients", "check_gradient", "select_gradients"]


class RowGradients(NamedTuple):
    """Gradients of the rows to update.

    Attributes:
        slots: Slots of the rows, (m,) ascending; None for all rows. On a GPU they may contain duplicates, which have
            the same gradient.
        values: Gradients of the rows, (m, ...).
        active: Which of the rows to update, (m,) bool; None for all. Only a GPU has inactive rows: it would have to
            wait for the host to drop them.
    """

    slots: Tensor | None
    values: Tensor
    active: Tensor | None


def check_gradient(parameter: Tensor, *, allow_complex: bool = False) -> None:
    """Raise unless a gradient is dense or row-sparse, real, and of the right shape."""
    gradient = parameter.grad
    if gradient is None:
        return
    is_row_sparse = gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1
    if not is_row_sparse and gradient.layout != torch.strided:
        layout = f"{gradient.layout}"
        if gradient.layout == torch.sparse_coo:
            layout += f" with {gradient.sparse_dim()} sparse dimensions"
        raise DtypeError(
            "gradient: expected a dense tensor, or a COO tensor that is sparse in its first dimension only, got "
            f"{layout}; convert it with .to_dense()"
        )
    if not gradient.is_floating_point() and not (allow_complex and gradient.is_complex()):
        raise DtypeError(f"gradient: expected a floating-point tensor, got {gradient.dtype}; pass its real part")
    if gradient.shape != parameter.shape:
        raise ShapeError(
            f"gradient: expected shape {tuple(parameter.shape)}, that of its Parameter, got {tuple(gradient.shape)}; "
            "call zero_grad() and backward() again"
        )


def select_gradients(gradient: Tensor, table: RowStorage | None) -> RowGradients:
    """Select the gradients of the rows to update.

    They are all rows with a gradient, or all live rows of a table with one. On a GPU, the rows of a table whose
    gradient is not finite are inactive; the next check of the table raises.
    """
    slots, values = None, gradient
    if is_deferred(gradient):
        if gradient.layout == torch.sparse_coo:
            slots, values = gradient._indices()[0], gradient._values()
            if not gradient.is_coalesced():
                slots, place, sums = sum_duplicates(slots, values)
                values = sums.index_select(0, place)
        return RowGradients(slots, values, None if table is None else _find_active(slots, values, table))
    if gradient.layout == torch.sparse_coo:
        gradient = coalesce(gradient)
        slots, values = gradient._indices()[0], gradient._values()
        if table is not None:
            live = table.ids.index_select(0, slots) >= 0
            if not bool(live.all()):
                slots, values = slots[live], values[live]
    return RowGradients(slots, values, None)


def _find_active(slots: Tensor | None, values: Tensor, table: RowStorage) -> Tensor:
    """Return which rows are live and have a finite gradient; record a failed check."""
    live = (table.ids if slots is None else table.ids.index_select(0, slots)) >= 0
    flat = values.unsqueeze(-1).flatten(1)
    table.pending_checks.check_finite("gradient", flat.masked_fill(~live.unsqueeze(-1), 0.0))
    return live & flat.isfinite().all(1)
