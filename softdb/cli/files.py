"""Files that the command reads: queries, keys, values, labels and saved stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch

from softdb._checks import FLOAT_DTYPES, describe, is_out_of_memory
from softdb.errors import ArgumentError
from softdb.store import SoftKVStore

__all__ = ["load_saved_store", "read_array", "read_labels", "read_queries", "read_store"]

Loaded = TypeVar("Loaded")


def load_saved_store(path: str, *, verify: bool) -> SoftKVStore:
    """Load a saved store with memory-mapped rows.

    Args:
        path: The directory that `softdb.SoftKVStore.save` wrote.
        verify: Whether to compare keys and values with their hashes, which reads all of them.
    """
    if os.path.isfile(path):
        raise ArgumentError(f"STORE_DIR: expected a directory that store.save() wrote, got the file {path!r}")
    return SoftKVStore.load(path, mmap=True, verify=verify, device="cpu")


def read_store(path: str, metric: Any, temperature: float | None) -> SoftKVStore:
    """Read a store: a saved one, or one with the ``keys`` and ``values`` of a file.

    Args:
        path: A directory that `softdb.SoftKVStore.save` wrote, or a .safetensors or .npz file.
        metric: Metric of a store that is made from a file; "scaled_dot" if None. Must be None for a saved store.
        temperature: Temperature of a store that is made from a file; 1 if None. Must be None for a saved store.
    """
    if os.path.isdir(path):
        if metric is not None or temperature is not None:
            raise ArgumentError(
                "--metric, --temperature: expected neither with a saved store, which has its own; remove them"
            )
        return load_saved_store(path, verify=True)
    tensors = _read(path, _load_npz if path.endswith(".npz") else safetensors.torch.load_file)
    if not {"keys", "values"} <= tensors.keys():
        names = ", ".join(map(repr, sorted(tensors))) or "none"
        raise ArgumentError(f"STORE: expected arrays 'keys' and 'values' in {path!r}, got {names}")
    keys, values = (_convert(path, tensors[name]) for name in ("keys", "values"))
    for name, rows in (("keys", keys), ("values", values)):
        if rows.dim() != 2 or rows.dtype not in FLOAT_DTYPES:
            raise ArgumentError(f"STORE: expected {name} of floating-point numbers, (rows, n), got {describe(rows)}")
    dtype = torch.promote_types(keys.dtype, values.dtype)
    store = SoftKVStore(
        keys.shape[1],
        values.shape[1],
        metric="scaled_dot" if metric is None else metric,
        temperature=1.0 if temperature is None else temperature,
        device="cpu",
        dtype=dtype,
    )
    store.add(keys, values)
    return store


def _load_npz(path: str) -> dict[str, Any]:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array, as in a .npy file")
    with arrays:
        return {name: arrays[name] if name in ("keys", "values") else None for name in arrays.files}


def read_array(path: str) -> torch.Tensor:
    """Read one array from a .npy file."""
    return _convert(path, _read(path, _load_npy))


def read_queries(path: str) -> torch.Tensor:
    """Read queries, (B, key_dim), from a .npy file."""
    queries = read_array(path)
    if queries.dim() != 2:
        raise ArgumentError(f"QUERIES: expected shape (B, key_dim), got {tuple(queries.shape)}")
    return queries


def read_labels(option: str, path: str, count: int, rows: str) -> list[str]:
    """Read labels from a text file, one per line, or from a .npy file.

    Args:
        option: The option that names the file, for messages.
        path: The file. A .npy file must contain a 1-dimensional array of strings or integers.
        count: Number of labels that are expected.
        rows: The rows or queries that the labels belong to, for messages.
    """
    if path.endswith(".npy"):
        array = _read(path, _load_npy)
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "Uiu":
            raise ArgumentError(
                f"{option}: expected a 1-dimensional array of strings or integers, got {describe(array)}"
            )
        labels = [str(label) for label in array.tolist()]
    else:
        try:
            labels = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"{option}: expected a text file in UTF-8, or a .npy file: {error}") from error
        labels = [label.strip() for label in (labels[:-1] if labels[-1] == "" else labels)]
    if len(labels) != count:
        raise ArgumentError(f"{option}: expected {count:,} labels, one for each of the {rows}, got {len(labels):,}")
    return labels


def _load_npy(path: str) -> Any:
    return np.load(path, allow_pickle=False)


def _read(path: str, load: Callable[[str], Loaded]) -> Loaded:
    try:
        return load(path)
    except OSError:
        raise
    except Exception as error:  # numpy, zipfile, zlib, tokenize and safetensors raise errors of many types
        if is_out_of_memory(error):
            raise
        raise ArgumentError(f"{path}: expected arrays in the format of numpy or safetensors: {error}") from error


def _convert(path: str, array: object) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise ArgumentError(f"{path}: expected one array of numbers of at most 64 bits, got {describe(array)}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
