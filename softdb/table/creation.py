"""Creation of a store from the tensors of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softdb._checks import Ids, describe
from softdb.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from softdb.table.writer import Fields, check_rows

__all__ = ["create_store"]

# Options of a store that are derived from the tensors, and the argument from which each is derived.
DERIVED_OPTIONS = {"key_dim": "keys", "value_dim": "values", "device": "keys", "dtype": "keys"}


def create_store(
    cls: Any, keys: Tensor, values: Tensor, ids: Ids | None, fields: Fields | None, options: Mapping[str, Any]
) -> Any:
    """Create a store of class ``cls`` that holds the given rows.

    Args:
        cls: Class of the store.
        keys: Keys of the rows. All arguments are those of `softdb.SoftKVStore.from_tensors`.
        values: Values of the rows.
        ids: Ids of the rows.
        fields: Fields of the rows.
        options: Other options of the store.
    """
    check_rows("keys", keys, None, None)
    check_rows("values", values, None, keys.device)
    if keys.is_meta:
        raise DeviceError("keys: expected a tensor with data, got one on the meta device; make an empty store instead")
    if keys.shape[1] == 0:
        raise ShapeError(f"keys: expected a width of at least 1, got shape {tuple(keys.shape)}")
    for name, source in DERIVED_OPTIONS.items():
        if name in options:
            raise ArgumentError(f"{name}: expected no value, since from_tensors takes it from {source}; leave it out")
    if fields is not None and not isinstance(fields, Mapping):
        raise DtypeError(f"fields: expected a mapping from field name to int64 tensor, got {describe(fields)}")
    store = cls(
        keys.shape[1],
        values.shape[1],
        fields=() if fields is None else tuple(fields),
        device=keys.device,
        dtype=torch.promote_types(keys.dtype, values.dtype),
        **options,
    )
    store.add(keys, values, ids, fields)
    return store
