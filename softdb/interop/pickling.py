"""Copies of stores for other processes and devices."""

from __future__ import annotations

import copy
import pickle
import weakref
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import nn

__all__ = ["send_copies", "set_up_replica"]

# Copies that were sent to each spawned process. A copy owns shared memory, so it is kept as long as the process exists.
_sent_copies: weakref.WeakKeyDictionary[Any, list[nn.Module]] = weakref.WeakKeyDictionary()


def send_copies(kind: type[nn.Module]) -> None:
    """Make pickle send copies of modules of a class to other processes.

    By default, torch sends a tensor by moving it to shared memory. Each process would then write to the rows of the
    other, but detect only its own writes. A store on which ``share_memory()`` was called is still shared.
    """
    ForkingPickler.register(kind, _reduce_copy)


def _reduce_copy(store: Any) -> Any:
    """Return what pickle needs to rebuild a copy of ``store``."""
    if store.keys.is_shared():
        return store.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    sent, process = copy.deepcopy(store), get_spawning_popen()
    if process is not None:  # The process inherits open files, so the copy must exist until the process starts.
        _sent_copies.setdefault(process, []).append(sent)
    return sent.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def set_up_replica(store: Any, replica: Any) -> Any:
    """Set up the replica of a store in torch.nn.DataParallel.

    DataParallel copies the attributes of the store; the replica needs its own table.
    """
    replica.__dict__["_table"] = copy.copy(store._table)
    replica._assemble()
    return replica
