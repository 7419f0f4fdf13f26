"""Conversion between a store and the contents of a snapshot."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_placement, is_out_of_memory
from softdb.errors import ArgumentError, CorruptSnapshotError, DeviceError, SoftDBError
from softdb.index.config import IndexConfig
from softdb.snapshot.reader import read_snapshot
from softdb.table.growth import change_columns
from softdb.table.journal import Growth
from softdb.table.slots import resize
from softdb.table.state import check_state
from softdb.table.table import FileRows, Table
from softdb.version import __version__

__all__ = ["collect_contents", "load_store"]

# Tensors that ``load(mmap=True)`` maps. No other step of loading reads them.
MAPPED_TENSORS = ("keys", "values", "rows.generation")
# Settings of a store that are saved; those of its index are saved separately.
SAVED_SETTINGS = (
    "key_dim",
    "value_dim",
    "metric",
    "temperature",
    "trainable",
    "sparse_grad",
    "capacity",
    "evict",
    "fields",
    "track_usage",
)


def collect_contents(table: Table, index: IndexConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect the tensors and the description of a store."""
    rows, config, store = table.rows, table.config, table.module
    used = rows.used
    table.check_not_sharded()
    tensors = {name: tensor.detach()[:used] for name, tensor in table.tensors().items()}
    with rows.access.counter_lock:  # Readers in other threads may count reads.
        tensors |= {f"rows.{name}": getattr(rows, name)[:used].clone() for name in rows.columns}
    tensors |= {"rows.ids": rows.ids[:used], "rows.next_id": rows.next_id}
    description = {name: getattr(store, name) for name in SAVED_SETTINGS if name != "track_usage"}
    description |= {"fields": list(config.fields), "index": asdict(index), "track_usage": config.track_usage}
    description |= {"rows": len(rows), "softdb": __version__}
    frozen = list_frozen_tensors(table)
    if frozen:  # without this entry, both tensors of a trainable store require gradients
        description["frozen"] = list(frozen)
    return tensors, description


def list_frozen_tensors(table: Table) -> tuple[str, ...]:
    """List the Parameters of a trainable store that do not require gradients.

    For rows that are mapped files, these are the Parameters that will not require gradients after `materialize`.
    """
    if table.files is not None:
        return table.files.frozen
    trainable = table.config.trainable
    return tuple(name for name, tensor in table.tensors().items() if trainable and not tensor.requires_grad)


def load_store(
    make: Callable[..., Any],
    path: str | os.PathLike[str],
    *,
    mmap: bool,
    verify: bool,
    device: torch.device | str | None,
) -> Any:
    """Load the store that was saved to ``path``, as `softdb.SoftKVStore.load` does.

    Args:
        make: Constructor of an empty store, called with its settings. The store has its `Table` as ``_table``.
        path: Directory of the snapshot.
        mmap: Whether to map the files of keys and values.
        verify: Whether to compare mapped files with their hashes.
        device: Device of the store.
    """
    place = resolve_device(device, mapped=mmap)
    tensors, description = read_snapshot(path, mapped=MAPPED_TENSORS if mmap else (), verify=verify or not mmap)
    try:
        settings = {name: description[name] for name in SAVED_SETTINGS}
        capacity = settings["capacity"]
        settings["capacity"] = None if capacity is None else 1  # avoid allocating storage that is replaced
        index = IndexConfig(**description["index"])
        store = make(**settings, index=index, device=place, dtype=tensors["keys"].dtype)
        table: Table = store._table
        if capacity is not None:
            table.config = replace(table.config, capacity=capacity)
            store.__dict__["capacity"] = table.config.capacity
        install_tensors(table, tensors, mapped=mmap, frozen=description.get("frozen", []))
    except torch.OutOfMemoryError:  # raised by a GPU
        raise
    except (SoftDBError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{path}: not enough memory for the store: {error}") from error
        raise CorruptSnapshotError(f"{path}: expected a snapshot written by save(), got {error}") from error
    return store


def install_tensors(table: Table, tensors: Mapping[str, Tensor], *, mapped: bool, frozen: Any) -> None:
    """Install the tensors of a snapshot in an empty table."""
    rows, config = table.rows, table.config
    if not isinstance(frozen, list) or not all(name in ("keys", "values") for name in frozen):
        raise ValueError(f"frozen rows {frozen!r}")
    names = {"keys", "values", *(f"rows.{name}" for name in rows.saved)}
    if tensors.keys() != names:
        raise ValueError(f"the tensors {sorted(tensors)}")
    used = tensors["rows.ids"].numel()
    capacity = used if mapped or config.capacity is None else config.capacity
    if used > capacity:
        raise ValueError(f"{used} rows")
    check_state(tensors, used, config.widths)
    if tensors["values"].dtype != table.values.dtype:
        raise ValueError(f"values of {tensors['values'].dtype}")
    fitted = {
        name: (tensor if tensor.dim() == 0 or capacity == used else resize(tensor, capacity, _fill_value(name)))
        for name, tensor in tensors.items()
    }
    here = {name: tensor.to(table.keys.device) for name, tensor in fitted.items()}
    buffers = {name: here[f"rows.{name}"] for name in rows.saved}
    buffers |= change_columns(capacity, table.keys.device, expanded=mapped)
    own = {name: here[name] for name in ("keys", "values")}
    table.install(Growth(buffers, own, dict.fromkeys(own)))
    rows.derive()
    if rows.slots.entries != len(rows):
        raise ValueError("a duplicate id")
    table.files = FileRows(tuple(frozen)) if mapped else None
    for name, tensor in table.tensors().items():
        tensor.requires_grad_(config.trainable and not mapped and name not in frozen)
    table.record_versions()


def resolve_device(device: torch.device | str | None, *, mapped: bool) -> torch.device:
    """Return the device to load to; raise if tensors cannot be allocated on it.

    Without this check, an error of the device would be reported as a corrupt snapshot.
    """
    if mapped and device is None:
        device = "cpu"  # independent of torch's default device
    place = check_placement("cpu" if device is None else device)
    if mapped and place.type != "cpu":
        raise ArgumentError(f"device: expected the CPU with mmap=True, got {place}; load without mmap")
    if place.type == "meta":
        raise DeviceError("device: expected a device that stores data, got meta; load to the CPU")
    return place


def _fill_value(name: str) -> int:
    """Return the value of a saved column in slots without a row."""
    return -1 if name == "rows.ids" else 0
