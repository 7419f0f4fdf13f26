"""`Table`: the keys and values of a module, slot by slot, and `RowStorage`, which says what rows they are."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softdb._checks import check_not_meta
from softdb.errors import ForeignWriteError, GrowthError, TransformError
from softdb.processes import is_distributed
from softdb.table.config import StoreConfig
from softdb.table.gradients import coalesced, is_sharded, resized_gradient, row_sparse
from softdb.table.growth import resized_buffers
from softdb.table.hooks import note_write, watch
from softdb.table.journal import Growth, Journal, WritePlan
from softdb.table.overwrites import check_lent_buffers, compare_versions, record_versions
from softdb.table.slots import place_of, resized
from softdb.table.storage import RowStorage
from softdb.transforms import is_wrapped

__all__ = ["FileRows", "Table"]


@dataclass(frozen=True)
class FileRows:
    """Rows that lie in the files of a snapshot, and are not written to.

    Attributes:
        frozen: The names of the tables that get no gradient once they are materialized.
    """

    frozen: tuple[str, ...] = ()


class Table:
    """The rows of a module: its ``keys`` and ``values``, (capacity, width), in slot order, and what rows they are.

    The module owns both tensors, so that torch finds them; the table refers to it weakly, so that nothing keeps a store
    alive that is no longer used.

    Args:
        module: What has ``keys`` and ``values``.
        rows: Ids, fields and versions of the rows.
        config: The settings of the store.
        open_reads: The reads that wait for their backward: true while there are any.

    Attributes:
        journal: Where a write is kept until it is applied.
        files: Where the rows lie, if in the files of a snapshot.
        has_warned_of_writes: Whether the store has warned of keys that were written to unnoticed.
        is_sharded: Whether FSDP2 has put shards in the place of the tensors, which it exchanges for whole ones in a
            forward.
    """

    def __init__(self, module: nn.Module, rows: RowStorage, config: StoreConfig, open_reads: object) -> None:
        self.rows, self.config, self.open_reads = rows, config, open_reads
        self.journal = Journal()
        self.files: FileRows | None = None
        self.is_sharded = self.has_warned_of_writes = False
        self.attach(module)

    def attach(self, module: nn.Module) -> None:
        """Take the tensors of ``module`` from now on: after a copy."""
        self._module = weakref.ref(module)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_module"}

    # -- the tensors -----------------------------------------------------------------------------------------

    @property
    def module(self) -> Any:
        """The module that owns the tensors."""
        module = self._module()
        if module is None:
            raise ReferenceError("store: expected a store that is still in use; keep a reference to it")
        return module

    @property
    def keys(self) -> Tensor:
        """The keys, or the tensor that lies in their place."""
        keys: Tensor = self.module.keys
        return keys

    @property
    def values(self) -> Tensor:
        """The values, or the tensor that lies in their place."""
        values: Tensor = self.module.values
        return values

    def tensors(self) -> dict[str, Tensor]:
        """Return keys and values by name."""
        module = self.module
        return {"keys": module.keys, "values": module.values}

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return the shape that keys or values must have."""
        return self.rows.capacity, self.config.widths[name]

    def lent(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return those of ``tensors`` that are not the store's own: of functional_call, FSDP2 or pruning."""
        recorded, tensors = self.rows.recorded, self.tensors() if tensors is None else tensors
        return {name: tensor for name, tensor in tensors.items() if recorded.own(name) is not tensor}

    def only_lends(self) -> bool:
        """Whether tensors are lent in the place of the store's own, and there is nothing else to follow."""
        written, replaced = compare_versions(self.rows, self.tensors())
        if written or not replaced:
            return False
        check_lent_buffers(self.rows, replaced - {"keys", "values"})
        return True

    def record_versions(self, lent: frozenset[str] = frozenset()) -> None:
        """Record that every write so far to the store's own tensors is accounted for, and watch for others."""
        module = self.module
        own = {**module._parameters, **module._buffers}
        tables = {name: own.get(name) for name in ("keys", "values") if name not in lent}
        record_versions(self.rows, {name: table for name, table in tables.items() if table is not None}, lent)
        for name, table in self.tensors().items():
            if self.rows.recorded.is_own(name, table):  # not while torch.func lends another tensor
                watch(table, self.rows, name)

    # -- checks ----------------------------------------------------------------------------------------------

    def check_not_meta(self) -> None:
        """Raise if there are no numbers to read or write."""
        for tensor in (self.keys, self.rows.ids):  # functional_call may lend keys to a store that has no rows
            check_not_meta("store", tensor, "load_state_dict() or add(), or reset_parameters() of its layer")

    def check_not_wrapped(self) -> None:
        """Raise if a transform of torch.func lends keys or values."""
        if is_wrapped(self.keys, self.values):
            raise TransformError(
                "keys, values: expected the store's own tensors, got some that a transform of torch.func wraps and "
                "functional_call lends; within functional_call only read the store"
            )

    def check_own(self) -> None:
        """Raise if other tensors are in the place of the store's own: what is written would be lost with them."""
        for name in self.lent():
            raise ForeignWriteError(
                f"{name}: expected the store's own tensor to write to, got another one in its place (of "
                "torch.func.functional_call, fully_shard or pruning); write before, or remove it"
            )

    def check_whole(self) -> None:
        """Raise if FSDP2 has left this process a part of the rows only."""
        for name, table in self.tensors().items():
            if is_sharded(table):
                raise ForeignWriteError(
                    f"{name}: expected all rows, got the shard of a DTensor; read in the forward of a module that "
                    "fully_shard was called on, or register the read with register_fsdp_forward_method(store, 'read')"
                )

    def check_size(self, name: str, table: Tensor) -> None:
        """Raise unless a tensor has as many slots as there are rows' buffers for."""
        shape = self.shape_of(name)
        if tuple(table.shape) != shape:
            raise ForeignWriteError(
                f"{name}: expected shape {shape}, got {tuple(table.shape)}: another store that shares the tensor has "
                "grown, or it was resized; call reserve() on both before sharing a tensor, or share the whole store"
            )

    # -- writing ---------------------------------------------------------------------------------------------

    def apply(self, plan: WritePlan) -> None:
        """Apply a plan to rows, keys, values and gradients: once or again, to the same end."""
        batch = plan.batch
        self.rows.apply_plan(plan)
        if len(batch.leaving):
            self._drop_gradients(batch.leaving)
            # A hidden row has weight 0, and 0 times NaN is NaN: whatever training left there must not linger.
            self.clear(batch.leaving[~torch.isin(batch.leaving, plan.placed)])
        if batch.afresh:
            self._drop_gradients(batch.slots)
        self._put(plan.written, {"keys": batch.keys, "values": batch.values})

    def clear(self, slots: Tensor) -> None:
        """Write zeros to the keys and values at ``slots``."""
        zero = torch.zeros((), device=self.keys.device)
        self._put(slots, {"keys": zero, "values": zero})

    def _put(self, slots: Tensor, contents: Mapping[str, Tensor | None]) -> None:
        """Write keys, values or both at ``slots``; other stores that share the tensors take note.

        Through ``.data``: torch counts no version up, so that a read of other rows may still go backward. Reads of
        these rows know by their staleness check.
        """
        if len(slots) == 0:
            return
        place: slice | Tensor | None = None
        for name, content in contents.items():
            if content is not None:
                tensor = getattr(self.module, name)
                table = tensor.data
                place = place_of(slots.to(table.device)) if place is None else place
                table[place] = content.to(table.dtype)
                note_write(tensor, self.rows, name)

    def _drop_gradients(self, slots: Tensor) -> None:
        """Drop what ``.grad`` holds for rows that are gone: the next row in their slot is another one."""
        for table in self.tensors().values():
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

    # -- storage ---------------------------------------------------------------------------------------------

    def growth_to(self, needed: int, *, exactly: bool = False) -> Growth | None:
        """Return storage for ``needed`` slots, at least doubled unless ``exactly``; None if there is room.

        Raises:
            GrowthError: The storage cannot grow now, or never.
        """
        capacity = self.rows.capacity
        if needed <= capacity:
            return None
        self.check_growth(needed, asked=exactly)
        return self.resized(needed if exactly else max(needed, 2 * capacity))

    def resized(self, capacity: int) -> Growth:
        """Return all tensors with another capacity, before any of them is set: memory may run out in between."""
        buffers, tables = resized_buffers(self.rows, capacity), self.tensors()
        larger = {name: resized(table.data, capacity) for name, table in tables.items()}
        gradients = {name: resized_gradient(table.grad, capacity) for name, table in tables.items()}
        return Growth(buffers, larger, gradients)

    def install(self, growth: Growth) -> None:
        """Use tensors of another size: as often as need be."""
        for name, buffer in growth.buffers.items():
            setattr(self.rows, name, buffer)
        for name, table in growth.tables.items():
            if self.config.trainable:
                swap_storage(getattr(self.module, name), table, growth.gradients[name])
            else:
                self.module._buffers[name] = table
        self.record_versions()

    def check_growth(self, needed: int, *, asked: bool = False, loaded: bool = False) -> None:
        """Raise unless the storage may hold ``needed`` rows: ``asked`` for by `reserve`, or ``loaded`` from a state."""
        config, capacity = self.config, self.rows.capacity
        if config.capacity is not None:
            raise GrowthError(
                f"the store would have to hold {needed} rows, but was made with capacity={config.capacity}: delete "
                "rows first, or make it with evict='lru' or evict='oldest', or with a larger capacity"
            )
        if not config.trainable:
            return
        if needed < capacity:  # as only a state that is loaded can be
            change, remedy = "shrink", ""
        else:
            exact = "" if loaded else " or more"  # a state that is loaded has room for so many rows, and no others
            change, remedy = "grow", f"call store.reserve({needed}){exact} beforehand, or "
        change = f"the storage must {change} from {capacity} to {needed} rows"
        if self.open_reads:
            raise GrowthError(
                f"{change}, but a read of it has not gone backward yet, and its gradients have the old size: "
                f"{remedy}call backward() or drop the read first, or read under torch.no_grad()"
            )
        # `reserve` is called before wrapping, and an empty store is not wrapped.
        if not asked and capacity > 0 and is_distributed():
            raise GrowthError(
                f"{change}, which DistributedDataParallel cannot follow: "
                f"{'load the state' if loaded else f'call store.reserve({needed}) or more'} before wrapping"
            )


def swap_storage(parameter: Tensor, table: Tensor, gradient: Tensor | None) -> None:
    """Let a Parameter hold another tensor, of another size, and stay the same object: optimisers keep it.

    A graph of the past, still referenced somewhere, holds the node that adds up this Parameter's gradient, made for the
    old size. torch makes a new one only when the dtype changes: it does, shortly.
    """
    parameter.grad = None
    parameter.data = table.new_empty(0, dtype=torch.float32 if table.dtype != torch.float32 else torch.half)
    parameter.data = table
    parameter.grad = gradient
