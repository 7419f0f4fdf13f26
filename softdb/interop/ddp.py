"""Stores among several processes: what DistributedDataParallel is to see of them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from softdb.table.gradients import row_sparse

__all__ = ["has_company", "is_asked_by_ddp", "is_within_ddp", "stand_in", "with_sparse_gradient"]


# The frames between a module that is walked and whoever walks it.
WALKS = frozenset(
    ("named_modules", "named_buffers", "named_parameters", "_named_members", "is_asked_by_ddp", "buffers", "<lambda>")
)


class _SparseTables(nn.Embedding):
    """A module whose gradients DistributedDataParallel takes to be row-sparse."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.sparse = True


def stand_in(module: nn.Module, *, sparse: bool) -> nn.Module:
    """Return a module with the Parameters of ``module``, as DistributedDataParallel is to see it, and no buffers."""
    standing = _SparseTables() if sparse else nn.Module()
    standing._parameters = module._parameters
    return standing


def has_company() -> bool:
    """Whether this is one of several processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_asked_by_ddp() -> bool:
    """Whether DistributedDataParallel walks the module, to lay out its buckets and the buffers that it broadcasts.

    Its first broadcast, of all Parameters and buffers, is asked for by another module of torch.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in WALKS:
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "torch.nn.parallel.distributed"


def is_within_ddp() -> bool:
    """Whether DistributedDataParallel is going forward: it takes no dense gradient where it expects a sparse one."""
    return torch.distributed.is_available() and nn.parallel.DistributedDataParallel._active_ddp_module is not None


def with_sparse_gradient(table: Tensor) -> Tensor:
    """Return ``table``, whose gradient comes back as a row-sparse one of all rows."""
    if not table.requires_grad:
        return table
    same: Tensor = _Sparse.apply(table)  # type: ignore[no-untyped-call]
    return same


class _Sparse(torch.autograd.Function):
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
