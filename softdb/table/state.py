"""Checks of the tensors in a snapshot or ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from softdb._checks import FLOAT_DTYPE_NAMES, FLOAT_DTYPES, INTEGER_DTYPES
from softdb.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["check_state"]


def check_state(state: Mapping[str, Tensor], capacity: int, widths: Mapping[str, int]) -> None:
    """Raise unless tensors have the dtypes and shapes of a store's tensors.

    Args:
        state: Tensors by name: "keys", "values", and the row buffers, whose names begin with "rows.".
        capacity: The number of slots.
        widths: The widths of keys and values, by name.
    """
    for name, tensor in sorted(state.items(), key=lambda item: item[0] != "rows.ids"):
        shape: tuple[int, ...] = () if name == "rows.next_id" else (capacity,)
        if name in widths:
            shape = (capacity, widths[name])
        inexact = name in widths or name == "rows.weight"
        if tensor.dtype not in (FLOAT_DTYPES if inexact else INTEGER_DTYPES):
            wanted = f"one of {FLOAT_DTYPE_NAMES}" if inexact else "int64"
            raise DtypeError(f"state_dict[{name!r}]: expected {wanted}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"state_dict[{name!r}]: expected shape {shape}, got {tuple(tensor.shape)}")
    if len(state["rows.ids"]) and int(state["rows.ids"].min()) < -1:
        raise ArgumentError(
            "state_dict['rows.ids']: expected ids of at least 0, and -1 at free slots, got numbers below -1"
        )
