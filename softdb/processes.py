"""Processes and their forked children: what is called in a child, and whether OpenMP threads may have been started."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["is_openmp_used", "note_openmp", "run_in_forked_children"]


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
