"""Modules that DistributedDataParallel uses in place of a store."""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["is_called_by_ddp", "make_stand_in"]


# Functions on the call stack between `is_called_by_ddp` and the caller that iterates over the module.
ITERATION_FUNCTIONS = frozenset(
    ("named_modules", "named_buffers", "named_parameters", "_named_members", "is_called_by_ddp", "buffers", "<lambda>")
)


class _SparseTables(nn.Embedding):
    """Module whose gradients DistributedDataParallel expects to be row-sparse."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.sparse = True


def make_stand_in(module: nn.Module, *, sparse: bool) -> nn.Module:
    """Create a module for DDP with the Parameters of ``module`` and no buffers."""
    substitute = _SparseTables() if sparse else nn.Module()
    substitute._parameters = module._parameters
    return substitute


def is_called_by_ddp() -> bool:
    """Return whether DistributedDataParallel is iterating over the module.

    DDP iterates to set up its gradient buckets and the list of buffers that it broadcasts. Another module of torch
    makes the first broadcast of all Parameters and buffers; for that module the result is False.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in ITERATION_FUNCTIONS:
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "torch.nn.parallel.distributed"
