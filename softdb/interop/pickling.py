"""Stores on their way to another process or device."""

from __future__ import annotations

import copy
import pickle
import weakref
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import nn

__all__ = ["replicated", "send_copies"]

# The memory that a process has its store in, as long as that process exists.
_copies: weakref.WeakKeyDictionary[Any, list[nn.Module]] = weakref.WeakKeyDictionary()


def send_copies(kind: type[nn.Module]) -> None:
    """Send copies of modules of a class to other processes, unless ``share_memory()`` was called.

    torch sends tensors by moving them to memory that both processes see: each would write to the rows of the other,
    and follow only its own writes.
    """
    ForkingPickler.register(kind, _reduced)


def _reduced(store: Any) -> Any:
    """Return what is pickled."""
    if store.keys.is_shared():
        return store.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    sent, process = copy.deepcopy(store), get_spawning_popen()
    if process is not None:  # which takes over open files: they are not to be closed before it begins
        _copies.setdefault(process, []).append(sent)
    return sent.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def replicated(store: Any, replica: Any) -> Any:
    """Give a replica of torch.nn.DataParallel, which copies attributes, a table of its own."""
    replica.__dict__["_table"] = copy.copy(store._table)
    replica._assemble()
    return replica
