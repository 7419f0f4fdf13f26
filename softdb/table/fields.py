"""Integer fields of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from softdb._checks import check_dense, describe, is_out_of_memory
from softdb.errors import DtypeError, FieldError, ShapeError

__all__ = ["RowView", "check_field_names", "check_fields"]


def check_field_names(fields: Sequence[str]) -> tuple[str, ...]:
    """Return the field names as a tuple; raise unless they are valid and unique."""
    if isinstance(fields, str) or not isinstance(fields, Iterable):
        raise DtypeError(f"fields: expected a sequence of names, got {describe(fields)}")
    names = tuple(fields)
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise FieldError(f"fields: expected names that are Python identifiers, got {describe(name)}")
    if "id" in names:
        raise FieldError("fields: expected names other than 'id', which is reserved for the row's id; rename the field")
    if len(set(names)) != len(names):
        raise FieldError(f"fields: expected each name once, got {names}")
    return names


def check_fields(fields: Sequence[str], given: object, count: int, *, complete: bool) -> dict[str, Tensor]:
    """Check field columns and convert them to int64.

    Args:
        fields: The names of the fields of the store.
        given: A mapping from field name to column.
        count: The number of rows.
        complete: Whether every field must be given.

    Returns:
        Columns of shape () or (count,), by name.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise DtypeError(f"fields: expected a mapping from field name to int64 tensor, got {describe(given)}")
    known = ", ".join(map(repr, fields)) or "none"
    unknown = [name for name in given if name not in fields]
    if unknown:
        raise FieldError(f"fields: expected names among this store's fields ({known}), got {unknown[0]!r}")
    missing = [name for name in fields if name not in given]
    if complete and missing:
        raise FieldError(f"fields: expected a column for every field ({known}), got none for {missing[0]!r}")
    return {name: check_column(name, column, count) for name, column in given.items()}


def check_column(name: str, column: object, count: int) -> Tensor:
    """Convert a column to an int64 tensor of shape () or (count,)."""
    try:
        if isinstance(column, np.ndarray):
            column = np.array(column, order="C")  # As in `convert_ids`.
        values = column.detach() if isinstance(column, Tensor) else torch.as_tensor(column, device="cpu")
        values = values.cpu()
        if values.numel() == 0:
            values = values.to(torch.int64)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise DtypeError(f"fields[{name!r}]: expected whole numbers (int64), got {describe(column)}") from error
    check_dense(f"fields[{name!r}]", values)
    if values.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise DtypeError(f"fields[{name!r}]: expected whole numbers (int64), got {values.dtype}")
    if values.shape not in ((), (count,)):
        raise ShapeError(
            f"fields[{name!r}]: expected one number or shape ({count},), one per row, got {tuple(values.shape)}"
        )
    return values.to(torch.int64)


class RowView(dict[str, Tensor]):
    """Columns of selected rows, by name."""

    def __missing__(self, name: str) -> Tensor:
        known = ", ".join(map(repr, self))
        raise FieldError(f"where: expected names among this store's fields ({known}), got {name!r}")
