"""Files that the command reads: queries, keys, values and saved stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch

from softdb._checks import FLOAT_DTYPES, describe, is_out_of_memory
from softdb.errors import ArgumentError
from softdb.store import SoftKVStore

__all__ = ["read_array", "read_store"]

Loaded = TypeVar("Loaded")


def read_store(path: str, metric: Any, temperature: float | None) -> SoftKVStore:
    """A store of the ``keys`` and ``values`` in a file."""
    if os.path.isdir(path):
        raise ArgumentError(
            f"STORE: expected a .safetensors or .npz file, got the directory {path!r}; compare a saved store in "
            "Python, by softdb.lab.compare(SoftKVStore.load(path), queries)"
        )
    tensors = _read(path, _load_npz if path.endswith(".npz") else safetensors.torch.load_file)
    if not {"keys", "values"} <= tensors.keys():
        found = ", ".join(map(repr, sorted(tensors))) or "none"
        raise ArgumentError(f"STORE: expected arrays 'keys' and 'values' in {path!r}, got {found}")
    keys, values = (_tensor(path, tensors[name]) for name in ("keys", "values"))
    for name, rows in (("keys", keys), ("values", values)):
        if rows.dim() != 2 or rows.dtype not in FLOAT_DTYPES:
            raise ArgumentError(f"STORE: expected {name} of floating-point numbers, (rows, n), got {describe(rows)}")
    dtype = torch.promote_types(keys.dtype, values.dtype)
    divisor = 1.0 if temperature is None else temperature
    store = SoftKVStore(keys.shape[1], values.shape[1], metric=metric, temperature=divisor, device="cpu", dtype=dtype)
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
    return _tensor(path, _read(path, lambda path: np.load(path, allow_pickle=False)))


def _read(path: str, load: Callable[[str], Loaded]) -> Loaded:
    try:
        return load(path)
    except OSError:
        raise
    except Exception as error:  # of whatever kind a broken file is to numpy, zipfile, zlib, tokenize or safetensors
        if is_out_of_memory(error):
            raise
        raise ArgumentError(f"{path}: expected arrays as numpy or safetensors write them: {error}") from error


def _tensor(path: str, array: object) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise ArgumentError(f"{path}: expected one array of numbers of at most 64 bits, got {describe(array)}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
