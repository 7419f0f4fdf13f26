"""`Table`: the keys and values of a module with their `RowStorage`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from softdb._checks import check_not_meta
from softdb.errors import ForeignWriteError, GrowthError, TransformError
from softdb.processes import is_distributed
from softdb.table.config import StoreConfig
from softdb.table.gradients import coalesce, is_sharded, make_row_sparse, resize_gradient
from softdb.table.growth import resize_buffers
from softdb.table.hooks import record_write, watch
from softdb.table.journal import Growth, Journal, WritePlan
from softdb.table.overwrites import check_substituted_buffers, compare_versions, record_versions
from softdb.table.slots import resize, slots_to_index
from softdb.table.storage import RowStorage
from softdb.transforms import is_wrapped

__all__ = ["FileRows", "Table"]


class OpenReads(Protocol):
    """Open reads: reads whose backward may still run."""

    def __bool__(self) -> bool:
        """Return whether there are any."""

    def keep_rows(self, rows: RowStorage, tables: Mapping[str, Tensor], changing: Tensor) -> None:
        """Copy the rows at the slots ``changing`` for the open reads that used them."""


@dataclass(frozen=True)
class FileRows:
    """Marker of rows that are memory-mapped, read-only files of a snapshot.

    Attributes:
        frozen: Names of the tensors that require no gradient after `SoftKVStore.materialize`.
    """

    frozen: tuple[str, ...] = ()


class Table:
    """Rows of a module: ``keys`` and ``values``, (capacity, width), and their storage.

    The module owns both tensors, so that torch finds them. The table holds only a weak reference to the module, so that
    an unused store is freed.

    Args:
        module: The module with the tensors ``keys`` and ``values``.
        rows: Ids, fields and versions of the rows.
        config: The settings of the store.
        open_reads: The reads whose backward is still due.

    Attributes:
        journal: The write in progress, until it is applied.
        files: Marker of memory-mapped rows of a snapshot; None for rows in memory.
        has_warned_of_writes: Whether the store has warned about unreported writes to keys.
        is_sharded: Whether FSDP2 has replaced the tensors by shards. It gathers them during a forward.
    """

    def __init__(self, module: nn.Module, rows: RowStorage, config: StoreConfig, open_reads: OpenReads) -> None:
        self.rows, self.config, self.open_reads = rows, config, open_reads
        self.journal = Journal()
        self.files: FileRows | None = None
        self.is_sharded = self.has_warned_of_writes = False
        self.attach(module)

    def attach(self, module: nn.Module) -> None:
        """Use the tensors of ``module``; call it after a copy of the table is made."""
        self._module = weakref.ref(module)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_module"}

    # -- the tensors -----------------------------------------------------------------------------------------

    @property
    def module(self) -> Any:
        """Module that owns the tensors."""
        module = self._module()
        if module is None:
            raise ReferenceError("store: expected a store that is still in use; keep a reference to it")
        return module

    @property
    def keys(self) -> Tensor:
        """Keys, or the tensor substituted for them."""
        keys: Tensor = self.module.keys
        return keys

    @property
    def values(self) -> Tensor:
        """Values, or the tensor substituted for them."""
        values: Tensor = self.module.values
        return values

    def tensors(self) -> dict[str, Tensor]:
        """Return keys and values by name."""
        module = self.module
        return {"keys": module.keys, "values": module.values}

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return the required shape of keys or values."""
        return self.rows.capacity, self.config.widths[name]

    def substituted_tensors(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the ``tensors`` that are not the store's own, by name.

        `torch.func.functional_call`, FSDP2 and pruning substitute other tensors for keys and values.
        """
        recorded, tensors = self.rows.recorded, self.tensors() if tensors is None else tensors
        return {name: tensor for name, tensor in tensors.items() if recorded.tensor(name) is not tensor}

    def has_only_substitutes(self) -> bool:
        """Return whether substituted tensors are the only change since the last record."""
        written, replaced = compare_versions(self.rows, self.tensors())
        if written or not replaced:
            return False
        check_substituted_buffers(self.rows, replaced - {"keys", "values"})
        return True

    def record_versions(self, substituted: frozenset[str] = frozenset()) -> None:
        """Record every write so far as processed, and watch the store's own tensors.

        The records of ``substituted`` names are kept as they are.
        """
        module = self.module
        own = {**module._parameters, **module._buffers}
        tables = {name: own.get(name) for name in ("keys", "values") if name not in substituted}
        record_versions(self.rows, {name: table for name, table in tables.items() if table is not None}, substituted)
        for name, table in self.tensors().items():
            if self.rows.recorded.is_own(name, table):  # torch.func may substitute another tensor.
                watch(table, self.rows, name)

    # -- checks ----------------------------------------------------------------------------------------------

    def check_not_meta(self) -> None:
        """Raise if keys or row buffers are meta tensors."""
        for tensor in (self.keys, self.rows.ids):  # functional_call may substitute the keys of a meta store.
            check_not_meta("store", tensor, "load_state_dict() or add(), or reset_parameters() of its layer")

    def check_not_wrapped(self) -> None:
        """Raise if a transform of torch.func has wrapped keys or values."""
        if is_wrapped(self.keys, self.values):
            raise TransformError(
                "keys, values: expected the store's own tensors, got tensors that functional_call has substituted and "
                "a transform of torch.func has wrapped; within functional_call only read the store"
            )

    def check_not_substituted(self) -> None:
        """Raise if keys or values are substituted, since writes to them would be lost."""
        for name in self.substituted_tensors():
            raise ForeignWriteError(
                f"{name}: expected the store's own tensor to write to, got a tensor that torch.func.functional_call, "
                "fully_shard or pruning has substituted; write before the substitution, or after it is removed"
            )

    def check_not_sharded(self) -> None:
        """Raise if this process holds only a shard of the rows, as with FSDP2."""
        for name, table in self.tensors().items():
            if is_sharded(table):
                raise ForeignWriteError(
                    f"{name}: expected all rows, got the shard of a DTensor; read in the forward of a module that "
                    "fully_shard was called on, or register the read with register_fsdp_forward_method(store, 'read')"
                )

    def check_size(self, name: str, table: Tensor) -> None:
        """Raise unless a tensor has the number of slots of the row buffers."""
        shape = self.shape_of(name)
        if tuple(table.shape) != shape:
            raise ForeignWriteError(
                f"{name}: expected shape {shape}, got {tuple(table.shape)}, since it was resized by other code or by "
                "another store that shares it; call reserve() on both stores before sharing a tensor, or share the "
                "whole store"
            )

    # -- writing ---------------------------------------------------------------------------------------------

    def keep_rows(self, plan: WritePlan) -> None:
        """Copy the rows that a plan will overwrite, for the open reads that used them."""
        if len(plan.changed_slots):
            self.open_reads.keep_rows(self.rows, self.tensors(), plan.changed_slots)

    def apply(self, plan: WritePlan) -> None:
        """Apply a plan to rows, keys, values and gradients.

        Repeated calls give the same result.
        """
        batch = plan.batch
        self.rows.apply_plan(plan)
        if len(batch.removed_slots):
            self._drop_gradients(batch.removed_slots)
            # Free slots are read with weight 0, and 0 * NaN is NaN: they must not contain NaN from training.
            self.clear(plan.freed_slots)
        if batch.new_generation:
            self._drop_gradients(batch.slots)
        self._put(plan.written_slots, {"keys": batch.keys, "values": batch.values})

    def clear(self, slots: Tensor) -> None:
        """Write zeros to the keys and values at ``slots``."""
        zero = torch.zeros((), device=self.keys.device)
        self._put(slots, {"keys": zero, "values": zero})

    def _put(self, slots: Tensor, contents: Mapping[str, Tensor | None]) -> None:
        """Write keys, values or both at ``slots``, and record the write in other stores.

        Writes go through ``.data``, which leaves version counters unchanged, so that open reads of other rows can run
        backward. Open reads of the written rows fail their staleness check.
        """
        if len(slots) == 0:
            return
        place: slice | Tensor | None = None
        for name, content in contents.items():
            if content is not None:
                tensor = getattr(self.module, name)
                table = tensor.data
                place = slots_to_index(slots.to(table.device)) if place is None else place
                table[place] = content.to(table.dtype)
                record_write(tensor, self.rows, name)

    def _drop_gradients(self, slots: Tensor) -> None:
        """Drop the gradients at ``slots``, whose rows are removed or replaced."""
        for table in self.tensors().values():
            gradient = table.grad
            if gradient is None or len(slots) == 0:
                continue
            if gradient.layout == torch.strided:
                gradient.detach()[slots.to(gradient.device)] = 0.0
                continue
            gradient = coalesce(gradient.detach())
            there = gradient.indices()[0]
            kept = ~torch.isin(there, slots.to(gradient.device))
            if not bool(kept.all()):
                table.grad = make_row_sparse(there[kept], gradient.values()[kept], gradient.shape)

    # -- storage ---------------------------------------------------------------------------------------------

    def prepare_growth(self, needed: int, *, exactly: bool = False) -> Growth | None:
        """Allocate storage for ``needed`` slots, if the present storage is smaller.

        Args:
            needed: The number of slots.
            exactly: Whether to allocate exactly this number; else the capacity at least doubles.

        Returns:
            The larger tensors; None if the storage has room.

        Raises:
            GrowthError: The storage cannot grow.
        """
        capacity = self.rows.capacity
        if needed <= capacity:
            return None
        self.check_growth(needed, reserved=exactly)
        return self.prepare_resize(needed if exactly else max(needed, 2 * capacity))

    def prepare_resize(self, capacity: int) -> Growth:
        """Copy all tensors to another capacity.

        `install` puts them into use once all are allocated, so that a failed allocation changes nothing.
        """
        buffers, tables = resize_buffers(self.rows, capacity), self.tensors()
        larger = {name: resize(table.data, capacity) for name, table in tables.items()}
        gradients = {name: resize_gradient(table.grad, capacity) for name, table in tables.items()}
        return Growth(buffers, larger, gradients)

    def install(self, growth: Growth) -> None:
        """Replace the tensors by resized ones; repeated calls give the same result."""
        for name, buffer in growth.buffers.items():
            setattr(self.rows, name, buffer)
        for name, table in growth.tables.items():
            if self.config.trainable:
                swap_storage(getattr(self.module, name), table, growth.gradients[name])
            else:
                self.module._buffers[name] = table
        self.record_versions()

    def check_growth(self, needed: int, *, reserved: bool = False, loaded: bool = False) -> None:
        """Raise unless the storage may be resized to ``needed`` rows.

        Args:
            needed: The number of rows.
            reserved: Whether `SoftKVStore.reserve` requested the size.
            loaded: Whether a loaded state requires the size.
        """
        config, capacity = self.config, self.rows.capacity
        if config.capacity is not None:
            raise GrowthError(
                f"rows: expected at most {config.capacity}, the store's capacity, got {needed}; delete rows first, or "
                "make the store with evict='lru' or evict='oldest', or with a larger capacity"
            )
        if not config.trainable:
            return
        if needed < capacity:  # Only a loaded state can be smaller.
            change, remedy = "shrink", ""
        else:
            exact = "" if loaded else " or more"  # A loaded state requires exactly this capacity.
            change, remedy = "grow", f"call store.reserve({needed}){exact} before the read, or "
        change = f"the storage must {change} from {capacity} to {needed} rows"
        if self.open_reads:
            raise GrowthError(
                f"{change}, but backward of a read is still due, and its gradients have the old size; {remedy}call "
                "backward() or delete the read first, or read under torch.no_grad()"
            )
        # DistributedDataParallel has not wrapped the store yet if `reserve` is called or the store has no slots.
        if not reserved and capacity > 0 and is_distributed():
            raise GrowthError(
                f"{change}, which DistributedDataParallel does not support; "
                f"{'load the state' if loaded else f'call store.reserve({needed}) or more'} before wrapping the module"
            )


def swap_storage(parameter: Tensor, table: Tensor, gradient: Tensor | None) -> None:
    """Replace the storage of a Parameter by a tensor of another size.

    The Parameter remains the same object, so that optimizers still refer to it. A graph that is still referenced may
    hold the Parameter's AccumulateGrad node, which expects gradients of the old size. torch creates a new node only
    when the dtype changes, so the dtype is changed temporarily.
    """
    parameter.grad = None
    parameter.data = table.new_empty(0, dtype=torch.float32 if table.dtype != torch.float32 else torch.half)
    parameter.data = table
    parameter.grad = gradient
