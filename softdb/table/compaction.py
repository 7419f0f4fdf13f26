"""Compaction: move rows to the lowest slots, and shrink the storage to them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from softdb.errors import ForeignWriteError, GrowthError
from softdb.processes import is_distributed
from softdb.table.gradients import select_gradient
from softdb.table.hooks import find_optimizers, follows_rows, tables_of
from softdb.table.journal import Growth
from softdb.table.storage import CHANGE_COLUMNS
from softdb.table.table import Table

__all__ = ["prepare_compaction"]


class _MovedState(NamedTuple):
    """State of a Parameter in a row optimizer, by new slot."""

    optimizer: Optimizer
    parameter: Tensor
    state: dict[str, object]


def prepare_compaction(table: Table) -> Callable[[], None] | None:
    """Copy the rows of a table to the lowest slots, in the same order.

    Equal, for every tensor with an entry per slot, to::

        slots = (rows.ids >= 0).nonzero().squeeze(-1)     # ascending
        tensor = tensor[slots]

    In a table with a fixed capacity, the free slots follow. The tensors are keys, values, their gradients, the buffers
    of the rows, and the state of row optimizers. The caller holds the exclusive lock. Nothing is changed.

    Args:
        table: The table.

    Returns:
        A function that installs the copies; repeated calls give the same result. None if there is nothing to do.

    Raises:
        GrowthError: Something depends on the present slots: an open read, the state of another optimizer, other
            processes, or shared memory.
        ForeignWriteError: Another store holds the same tensors.
    """
    rows = table.rows
    live = rows.live_slots()
    capacity = table.config.capacity or len(live)
    is_moving = rows.used > len(live)
    if not is_moving and rows.capacity == capacity:
        return None
    _check_compaction(table)
    slots = torch.cat([live, (rows.ids < 0).nonzero().squeeze(-1)])[:capacity]
    names = ("ids", *CHANGE_COLUMNS, *rows.columns)
    buffers = {name: getattr(rows, name).index_select(0, slots) for name in names}
    tensors = table.tensors()
    tables = {name: tensor.data.index_select(0, slots) for name, tensor in tensors.items()}
    gradients = {name: select_gradient(tensor.grad, slots) for name, tensor in tensors.items()}
    states = [
        _MovedState(optimizer, parameter, optimizer._select_state(parameter, slots))
        for parameter in set(tensors.values())
        for optimizer in find_optimizers(parameter)
    ]
    writes = rows.writes + 1 if is_moving else None
    return functools.partial(_install, table, Growth(buffers, tables, gradients), states, writes)


def _install(table: Table, compacted: Growth, states: list[_MovedState], writes: int | None) -> None:
    """Install the copies.

    Args:
        table: The table.
        compacted: The copies of its tensors.
        states: The copies of the states of row optimizers.
        writes: The new counter of writes if rows have moved; else None.
    """
    rows = table.rows
    table.install(compacted)
    for optimizer, parameter, state in states:
        optimizer.state[parameter].update(state)
    if writes is not None:  # Otherwise every row keeps its slot, and so does the index.
        rows.writes = writes
        rows.derive()
        rows.average.reset()
        table.record_versions()


def _check_compaction(table: Table) -> None:
    """Raise if something depends on the present slots of the rows."""
    if table.open_reads:
        raise GrowthError(
            "compact: expected no read that waits for its backward, got one, whose rows would move to other slots; "
            "call backward() or delete the read first, or read under torch.no_grad()"
        )
    if table.config.trainable and is_distributed():
        raise GrowthError(
            "compact: expected a single process, got several, where DistributedDataParallel needs Parameters of a "
            "fixed size; compact the store before the process group is initialized"
        )
    for name, tensor in table.tensors().items():
        if tensor.is_cpu and tensor.is_shared():
            raise GrowthError(
                f"{name}: expected memory of this process, got shared memory, which other processes read by slot; "
                "compact the store before share_memory(), or compact a copy.deepcopy of it"
            )
        if any(other is not table.rows for other in tables_of(tensor)):
            raise ForeignWriteError(
                f"{name}: expected a tensor of this store alone, got one that another store shares, whose rows would "
                "move too; compact both stores before they share a tensor, or share the whole store"
            )
        _check_optimizers(name, tensor)


def _check_optimizers(name: str, tensor: Tensor) -> None:
    """Raise if an optimizer that does not follow rows has state for each row."""
    if not _find_fixed_optimizers(tensor):
        return
    gc.collect()  # A scheduler and its optimizer refer to each other, so deleting them does not free them at once.
    for optimizer in _find_fixed_optimizers(tensor):
        raise GrowthError(
            f"compact: expected no optimizer with state for the rows of {name}, got {type(optimizer).__name__}, which "
            "does not follow rows to other slots; compact the store before constructing the optimizer, delete the "
            "optimizer and construct a new one afterwards, or use softdb.optim.RowAdam"
        )


def _find_fixed_optimizers(tensor: Tensor) -> list[Optimizer]:
    """Return the optimizers whose state for the rows of ``tensor`` cannot move."""
    return [
        optimizer
        for optimizer in find_optimizers(tensor)
        if not follows_rows(optimizer)
        and any(isinstance(state, Tensor) and state.dim() > 0 for state in optimizer.state[tensor].values())
    ]
