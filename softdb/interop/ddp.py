"""Stores among several processes: what DistributedDataParallel is to see of them."""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["is_asked_by_ddp", "stand_in"]


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


def is_asked_by_ddp() -> bool:
    """Whether DistributedDataParallel walks the module, to lay out its buckets and the buffers that it broadcasts.

    Its first broadcast, of all Parameters and buffers, is asked for by another module of torch.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in WALKS:
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "torch.nn.parallel.distributed"
