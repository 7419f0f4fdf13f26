"""What a snapshot holds of a store: made from its table, and made into one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from softdb._checks import is_out_of_memory
from softdb.errors import ArgumentError, CorruptSnapshotError, DeviceError, SoftDBError
from softdb.index.config import IndexConfig
from softdb.snapshot.reader import read_snapshot
from softdb.table.growth import change_columns
from softdb.table.journal import Growth
from softdb.table.slots import resized
from softdb.table.state import check_state
from softdb.table.table import FileRows, Table
from softdb.version import __version__

__all__ = ["contents_of", "load_store"]

# What `load` leaves in its files: what only a look at rows, or an optimiser, needs.
MAPPED = ("keys", "values", "rows.generation")
# The settings of a store that are saved, besides those of its index.
SETTINGS = (
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


def contents_of(table: Table, index: IndexConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the description of a store."""
    rows, config, store = table.rows, table.config, table.module
    used = rows.used
    table.check_whole()
    tensors = {name: tensor.detach()[:used] for name, tensor in table.tensors().items()}
    with rows.access.alone:  # readers in other threads count on
        tensors |= {f"rows.{name}": getattr(rows, name)[:used].clone() for name in rows.columns}
    tensors |= {"rows.ids": rows.ids[:used], "rows.next_id": rows.next_id}
    description = {name: getattr(store, name) for name in SETTINGS if name != "track_usage"}
    description |= {"fields": list(config.fields), "index": asdict(index), "track_usage": config.track_usage}
    description |= {"rows": len(rows), "softdb": __version__}
    frozen = frozen_tensors(table)
    if frozen:  # snapshots without it say that all is as trainable as the store
        description["frozen"] = list(frozen)
    return tensors, description


def frozen_tensors(table: Table) -> tuple[str, ...]:
    """Return the names of the Parameters that get no gradient, or will get none once rows in files are materialized."""
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
    """Return the store that was saved to ``path``, as `softdb.SoftKVStore.load` says.

    Args:
        make: Makes an empty store from its settings; the store has its `Table` as ``_table``.
        path: The directory.
        mmap: Whether keys and values stay in their files.
        verify: Whether those are compared with their hashes.
        device: Where the store shall lie.
    """
    place = place_for(device, mapped=mmap)
    tensors, description = read_snapshot(path, mapped=MAPPED if mmap else (), verify=verify or not mmap)
    try:
        settings = {name: description[name] for name in SETTINGS}
        capacity = settings["capacity"]
        settings["capacity"] = None if capacity is None else 1  # it gets tensors that are there already
        index = IndexConfig(**description["index"])
        store = make(**settings, index=index, device=place, dtype=tensors["keys"].dtype)
        table: Table = store._table
        if capacity is not None:
            table.config = replace(table.config, capacity=capacity)
            store.__dict__["capacity"] = table.config.capacity
        take_over(table, tensors, mapped=mmap, frozen=description.get("frozen", []))
    except torch.OutOfMemoryError:  # of a GPU
        raise
    except (SoftDBError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{path}: there is no memory for the store: {error}") from error
        raise CorruptSnapshotError(f"{path}: expected what save() writes, got {error}") from error
    return store


def take_over(table: Table, tensors: Mapping[str, Tensor], *, mapped: bool, frozen: Any) -> None:
    """Let the tensors of a snapshot be those of an empty table."""
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
        name: (tensor if tensor.dim() == 0 or capacity == used else resized(tensor, capacity, _empty(name)))
        for name, tensor in tensors.items()
    }
    here = {name: tensor.to(table.keys.device) for name, tensor in fitted.items()}
    buffers = {name: here[f"rows.{name}"] for name in rows.saved}
    buffers |= change_columns(capacity, table.keys.device, expanded=mapped)
    own = {name: here[name] for name in ("keys", "values")}
    table.install(Growth(buffers, own, dict.fromkeys(own)))
    rows.derive()
    if rows.slots.entries != len(rows):
        raise ValueError("an id twice")
    table.files = FileRows(tuple(frozen)) if mapped else None
    for name, tensor in table.tensors().items():
        tensor.requires_grad_(config.trainable and not mapped and name not in frozen)
    table.record_versions()


def place_for(device: torch.device | str | None, *, mapped: bool) -> torch.device:
    """Return the device to load to, if tensors can be put there; errors would else blame the snapshot."""
    if mapped and device is None:
        device = "cpu"  # whatever torch's default is
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise DeviceError(f"device: expected one that torch can use here, got {device!r}: {error}") from error
    if mapped and place.type != "cpu":
        raise ArgumentError(f"device: expected the CPU beside mmap=True, got {place}; load without mmap")
    if place.type == "meta":
        raise DeviceError("device: expected one that holds numbers, got meta, which holds none")
    return place


def _empty(name: str) -> int:
    """Return what a column of the saved tensors holds where there is no row."""
    return -1 if name == "rows.ids" else 0
