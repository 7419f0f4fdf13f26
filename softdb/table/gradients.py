"""Gradients of rows: dense, or row-sparse as COO tensors."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from softdb.table.slots import resize
from softdb.table.sparse_norm import register_sparse_norm

__all__ = ["coalesce", "is_sharded", "make_row_sparse", "resize_gradient", "select_gradient", "with_sparse_gradient"]


def is_sharded(tensor: object) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def make_row_sparse(  # (m,), (m, ...)
    rows: Tensor, values: Tensor, shape: torch.Size, *, is_coalesced: bool = True
) -> Tensor:
    """Create a COO tensor of ``shape`` that holds ``values`` at ``rows``.

    Args:
        rows: Numbers of the rows.
        values: Their contents.
        shape: Shape of the tensor.
        is_coalesced: Whether the rows are ascending without duplicates. Otherwise the values of equal rows are summed
            when the tensor is used.
    """
    register_sparse_norm()
    # torch.sparse_coo_tensor(check_invariants=False) would skip the checks too, but torch 2.11 and 2.12 then warn that
    # checks are disabled: https://github.com/pytorch/pytorch/issues/178274.
    whole: Tensor = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors(
        1,
        values.dim() - 1,
        shape,
        rows.unsqueeze(0),
        values,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=values.device,
        is_coalesced=is_coalesced,
    )
    return whole


def coalesce(gradient: Tensor) -> Tensor:
    """Coalesce a row-sparse gradient, without sorting if its rows are in order."""
    if gradient.is_coalesced():
        return gradient
    slots = gradient._indices()[0]
    if bool((slots[1:] > slots[:-1]).all()):
        gradient._coalesced_(True)
    whole: Tensor = gradient.coalesce()  # This is a no-op if the flag is set.
    return whole


def resize_gradient(gradient: Tensor | None, capacity: int) -> Tensor | None:
    """Resize a gradient to a table with ``capacity`` slots."""
    if gradient is None:
        return None
    if gradient.layout == torch.strided:
        return resize(gradient, capacity)
    gradient = coalesce(gradient)
    return make_row_sparse(gradient._indices()[0], gradient._values(), torch.Size((capacity, *gradient.shape[1:])))


def select_gradient(gradient: Tensor | None, slots: Tensor) -> Tensor | None:  # (m,), each slot once
    """Select the gradients of ``slots``, in their order."""
    if gradient is None:
        return None
    gradient = gradient.detach()
    if gradient.layout == torch.strided:
        return gradient.index_select(0, slots)
    gradient = coalesce(gradient)
    place_of = slots.new_full((len(gradient),), -1)
    place_of[slots] = torch.arange(len(slots), device=slots.device)
    places, order = place_of[gradient._indices()[0]].sort()
    order = order[places >= 0]
    shape = torch.Size((len(slots), *gradient.shape[1:]))
    return make_row_sparse(places[places >= 0], gradient._values().index_select(0, order), shape)


def with_sparse_gradient(table: Tensor) -> Tensor:
    """Return ``table`` with a backward that makes its gradient row-sparse."""
    if not table.requires_grad:
        return table
    same: Tensor = _RowSparse.apply(table)  # type: ignore[no-untyped-call]
    return same


class _RowSparse(torch.autograd.Function):
    """Identity whose backward returns the gradient as a row-sparse tensor of all rows."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradient = grads[0]
        if gradient.layout != torch.strided:
            return gradient
        rows = torch.arange(len(gradient), device=gradient.device)
        return make_row_sparse(rows, gradient.contiguous(), gradient.shape)
