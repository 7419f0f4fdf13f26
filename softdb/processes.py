"""Facts about the process: process group, forks and the use of OpenMP."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["is_distributed", "is_openmp_used", "is_within_ddp", "note_openmp", "run_in_forked_children"]


def is_distributed() -> bool:
    """Return whether the default process group has more than one process."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_within_ddp() -> bool:
    """Return whether a DistributedDataParallel module is in its forward.

    DDP does not accept a dense gradient where it expects a sparse one.
    """
    return torch.distributed.is_available() and nn.parallel.DistributedDataParallel._active_ddp_module is not None


def run_in_forked_children(function: Callable[[], None]) -> None:
    """Call ``function`` in every child process that is forked from now on.

    It does nothing where processes cannot fork.
    """
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=function)


_openmp_used = False


def note_openmp() -> None:
    """Record that this process runs kernels of softdb, which may start OpenMP threads."""
    global _openmp_used
    _openmp_used = True


def is_openmp_used() -> bool:
    """Return whether `note_openmp` was called in this process or before its fork."""
    return _openmp_used
