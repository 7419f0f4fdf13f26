"""Gradients of rows: dense, or row-sparse, as coalesced COO tensors."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from softdb.table.slots import resized

__all__ = ["coalesced", "is_sharded", "resized_gradient", "row_sparse", "with_sparse_gradient"]


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def row_sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:  # (m,) ascending, (m, ...)
    """A gradient of ``shape`` that is 0 but in ``rows``: coalesced COO."""
    # torch.sparse_coo_tensor(check_invariants=False) checks nothing either, but warns of that in torch 2.11 and 2.12:
    # https://github.com/pytorch/pytorch/issues/178274.
    whole: Tensor = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors(
        1,
        values.dim() - 1,
        shape,
        rows.unsqueeze(0),
        values,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=values.device,
        is_coalesced=True,
    )
    return whole


def coalesced(gradient: Tensor) -> Tensor:
    """A row-sparse gradient that names each row once, in order: itself if it does so already."""
    if gradient.is_coalesced():
        return gradient
    slots = gradient._indices()[0]
    if bool((slots[1:] > slots[:-1]).all()):
        gradient._coalesced_(True)
    whole: Tensor = gradient.coalesce()  # itself, once it says that it is
    return whole


def resized_gradient(gradient: Tensor | None, capacity: int) -> Tensor | None:
    """Return a gradient of a table with another number of slots."""
    if gradient is None:
        return None
    if gradient.layout == torch.strided:
        return resized(gradient, capacity)
    gradient = coalesced(gradient)
    return row_sparse(gradient._indices()[0], gradient._values(), torch.Size((capacity, *gradient.shape[1:])))


def with_sparse_gradient(table: Tensor) -> Tensor:
    """Return ``table``, whose gradient comes back as a row-sparse one of all rows."""
    if not table.requires_grad:
        return table
    same: Tensor = _RowSparse.apply(table)  # type: ignore[no-untyped-call]
    return same


class _RowSparse(torch.autograd.Function):
    """The identity; the gradient goes back as a row-sparse one of all rows."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradient = grads[0]
        if gradient.layout != torch.strided:
            return gradient
        rows = torch.arange(len(gradient), device=gradient.device)
        return row_sparse(rows, gradient.contiguous(), gradient.shape)
