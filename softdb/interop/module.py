"""Operations of `torch.nn.Module` on a store: assignment, conversion and repr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softdb._checks import check_above_zero, check_dtype, check_float_tensor, describe
from softdb.errors import ArgumentError, DtypeError
from softdb.table.gradients import is_sharded
from softdb.table.hooks import pause_watching
from softdb.table.overwrites import check_ids_unchanged
from softdb.table.table import Table
from softdb.transforms import unwrap_tensors

__all__ = [
    "FIXED_NAMES",
    "check_assigned",
    "check_deletion",
    "convert",
    "describe_store",
    "replace_tensor",
]

# Attributes that are fixed after construction, because the shapes of tensors and the index depend on them.
FIXED_NAMES = ("key_dim", "value_dim", "metric", "trainable", "capacity", "evict")


def check_assigned(module: Any, name: str, value: Any) -> Any:
    """Return the value to assign to an attribute of a store, or raise."""
    if name == "temperature":
        value = unwrap_tensors(name, value)
        if isinstance(value, Tensor) and value.requires_grad:
            raise DtypeError(
                "temperature: expected a number, got a tensor that requires grad; pass it to read(temperature=...)"
            )
        return check_above_zero(name, value)
    if name in FIXED_NAMES and name in module.__dict__:
        own = module.__dict__[name]
        if type(value) is not type(own) or value != own:
            raise ArgumentError(
                f"{name}: expected {own!r}, which the store was made with, got {describe(value)}; make another "
                f"store with {name}=..."
            )
    if name == "rows" and "_table" in module.__dict__:
        module._table.rows = value  # DataParallel assigns the rows of a replica
    return value


def check_deletion(module: nn.Module, name: str) -> None:
    """Raise if ``keys`` or ``values`` is deleted.

    Without this check, the caller in torch would fail after the deletion, which leaves the store without the tensor.
    """
    if name in ("keys", "values") and name not in module.__dict__:
        raise ArgumentError(
            f"{name}: expected no deletion, because torch.nn.utils.parametrize cannot name a tensor {name!r}, and "
            "FSDP1 cannot flatten it; pass other tensors with torch.func.functional_call, or use fully_shard"
        )


def replace_tensor(table: Table, name: str, value: Any, assign: Callable[[str, Any], None]) -> None:
    """Assign another tensor of the same rows to ``keys`` or ``values``.

    Args:
        table: The rows.
        name: "keys" or "values".
        value: The new tensor.
        assign: ``__setattr__`` of `torch.nn.Module`.
    """
    if value is None:
        raise DtypeError(f"{name}: expected a tensor, got None")
    module = table.module
    is_table = name in module._parameters or name in module._buffers or isinstance(value, nn.Parameter)
    if is_table and is_sharded(value):
        table.is_sharded = True
    if not is_table or table.is_sharded or not isinstance(value, Tensor):
        assign(name, value)  # FSDP2 and pruning assign plain tensors, and torch rejects other values.
        return
    check_float_tensor(name, value, table.shape_of(name))
    with table.rows.access.writing():
        assign(name, value)
        table.rows.mark_updated(keys=name == "keys")
        table.record_versions()


def convert(table: Table, fn: Callable[[Tensor], Tensor], apply: Callable[[], object]) -> None:
    """Convert keys, values and the buffers of rows.

    Args:
        table: The rows.
        fn: Function that converts a tensor, as `torch.nn.Module._apply` takes it.
        apply: Call of `torch.nn.Module._apply` on the store with ``fn``.
    """
    module, rows = table.module, table.rows
    if not module.keys.is_meta:
        check_ids_unchanged(rows)
    # Try the conversion on empty tensors, so that an error leaves the store unchanged.
    check_dtype(fn(module.keys.detach().new_empty(0)).dtype)
    id_dtype = fn(rows.ids.new_empty(0)).dtype
    if id_dtype != torch.int64:
        raise DtypeError(f"dtype: expected ids to stay int64, got {id_dtype}; convert with .to(), not with .type()")
    before = module.keys.data_ptr(), module.values.data_ptr()
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    with pause_watching(own), rows.recorded.suspend():
        apply()
    if rows.was_emptied:
        module.keys.data.zero_()
        module.values.data.zero_()
    if before != (module.keys.data_ptr(), module.values.data_ptr()):  # otherwise nothing was converted
        rows.mark_updated()
        rows.layout += 1
    table.record_versions()


def describe_store(store: Any, factory: str) -> str:
    """Return the settings that ``repr`` shows; some are omitted if they are default."""
    shown = {"rows": len(store.rows), "key_dim": store.key_dim, "value_dim": store.value_dim, "metric": store.metric}
    defaults = {"temperature": 1.0, "fields": (), "capacity": None, "evict": None}
    shown |= {name: getattr(store, name) for name, default in defaults.items() if getattr(store, name) != default}
    shown |= {"trainable": store.trainable, "index": factory}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())
