"""Processes: whether this is one of several, and what is done in forked children."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["is_distributed", "is_openmp_used", "is_within_ddp", "note_openmp", "run_in_forked_children"]


def is_distributed() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_within_ddp() -> bool:
    """Whether DistributedDataParallel is going forward: it takes no dense gradient where it expects a sparse one."""
    return torch.distributed.is_available() and nn.parallel.DistributedDataParallel._active_ddp_module is not None


def run_in_forked_children(function: Callable[[], None]) -> None:
    """Call ``function`` in each child forked from now on; do nothing where processes cannot fork."""
    if hasattr(os, "register_at_fork"):  # Windows has none
        os.register_at_fork(after_in_child=function)


_openmp_used = False


def note_openmp() -> None:
    """Note that this process is about to run softdb's kernels, which may start OpenMP threads."""
    global _openmp_used
    _openmp_used = True


def is_openmp_used() -> bool:
    """Return whether `note_openmp` was called in this process, or in its parent before the fork."""
    return _openmp_used
