"""Keys and values as a store holds them: written slot by slot, and given room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from softdb.errors import ForeignWriteError
from softdb.table.gradients import coalesced, is_sharded, resized_gradient, row_sparse
from softdb.table.hooks import note_write
from softdb.table.journal import Growth
from softdb.table.slots import place_of, resized
from softdb.table.storage import RowStorage

__all__ = [
    "check_own",
    "check_size",
    "check_whole",
    "forget_gradients",
    "grown",
    "lent_of",
    "only_lends",
    "put_rows",
    "swap_storage",
]

Tables = Mapping[str, Tensor]  # "keys" and "values", (capacity, width)


def put_rows(tables: Tables, rows: RowStorage, slots: Tensor, contents: Mapping[str, Tensor | None]) -> None:
    """Write keys, values or both at ``slots``; other stores that share the tensors take note.

    Through ``.data``: torch counts no version up, so that a read of other rows may still go backward. Reads of these
    rows know by their staleness check.
    """
    if len(slots) == 0:
        return
    place: slice | Tensor | None = None
    for name, content in contents.items():
        if content is not None:
            table = tables[name].data
            place = place_of(slots.to(table.device)) if place is None else place
            table[place] = content.to(table.dtype)
            note_write(tables[name], rows, name)


def forget_gradients(tables: Iterable[Tensor], slots: Tensor) -> None:
    """Drop what ``.grad`` holds for rows that are gone: the next row in their slot is another one."""
    for table in tables:
        gradient = table.grad
        if gradient is None or len(slots) == 0:
            continue
        if gradient.layout == torch.strided:
            gradient.detach()[slots.to(gradient.device)] = 0.0
            continue
        gradient = coalesced(gradient.detach())
        there = gradient.indices()[0]
        kept = ~torch.isin(there, slots.to(gradient.device))
        if not bool(kept.all()):
            table.grad = row_sparse(there[kept], gradient.values()[kept], gradient.shape)


def grown(tables: Tables, rows: RowStorage, capacity: int) -> Growth:
    """Return all tensors with another capacity, before any of them is set: memory may run out in between."""
    larger = {name: resized(table.data, capacity) for name, table in tables.items()}
    gradients = {name: resized_gradient(table.grad, capacity) for name, table in tables.items()}
    return Growth(rows.resized(capacity), larger, gradients)


def swap_storage(parameter: Tensor, table: Tensor, gradient: Tensor | None) -> None:
    """Let a Parameter hold another tensor, of another size, and stay the same object: optimisers keep it.

    A graph of the past, still referenced somewhere, holds the node that adds up this Parameter's gradient, made for the
    old size. torch makes a new one only when the dtype changes: it does, shortly.
    """
    parameter.grad = None
    parameter.data = table.new_empty(0, dtype=torch.float32 if table.dtype != torch.float32 else torch.half)
    parameter.data = table
    parameter.grad = gradient


# -- tensors that others write to or replace -------------------------------------------------------------


def lent_of(tables: Tables, rows: RowStorage) -> dict[str, Tensor]:
    """Return those of ``tables`` that are not the store's own: of functional_call, FSDP2 or pruning."""
    return {name: table for name, table in tables.items() if not rows.is_own(name, table)}


def only_lends(tables: Tables, rows: RowStorage) -> bool:
    """Whether tensors are lent in the place of the store's own, and there is nothing else to follow."""
    written, replaced = rows.compare_versions(tables)
    if written or not replaced:
        return False
    rows.check_lent(replaced - tables.keys())
    return True


def check_own(tables: Tables, rows: RowStorage) -> None:
    """Raise if other tensors are in the place of the store's own: what is written would be lost with them."""
    for name in lent_of(tables, rows):
        raise ForeignWriteError(
            f"{name}: expected the store's own tensor to write to, got another one in its place (of "
            "torch.func.functional_call, fully_shard or pruning); write before, or remove it"
        )


def check_whole(tables: Tables) -> None:
    """Raise if FSDP2 has left this process a part of the rows only."""
    for name, table in tables.items():
        if is_sharded(table):
            raise ForeignWriteError(
                f"{name}: expected all rows, got the shard of a DTensor; read in the forward of a module that "
                "fully_shard was called on, or register the read with register_fsdp_forward_method(store, 'read')"
            )


def check_size(name: str, table: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless a table has as many slots as the store knows of."""
    if tuple(table.shape) != shape:
        raise ForeignWriteError(
            f"{name}: expected shape {shape}, got {tuple(table.shape)}: another store that shares the tensor has "
            "grown, or it was resized; call reserve() on both before sharing a tensor, or share the whole store"
        )
