"""Segments of the tokens of all sequences: keys, values and documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from softdb._checks import check_shape
from softdb.errors import ArgumentError, DtypeError

__all__ = [
    "SEGMENT_NAMES",
    "Segment",
    "check_segment",
    "copy_segment",
    "load_count",
    "map_segment",
    "new_segment",
    "no_tokens",
    "select_sequences",
]


Segment = tuple[Tensor, Tensor, Tensor]  # keys, values and documents, (batch, n, ...)


SEGMENT_NAMES = ("keys", "values", "documents")


def new_segment(batch: int, count: int, widths: tuple[int, int], like: Tensor) -> Segment:
    """Create keys, values and documents of zeros."""
    keys, values = (torch.zeros(batch, count, width, dtype=like.dtype, device=like.device) for width in widths)
    return keys, values, torch.zeros(batch, count, dtype=torch.int64, device=like.device)


def map_segment(function: Callable[[Tensor], Tensor], segment: Segment) -> Segment:
    """Apply a function to keys, values and documents."""
    keys, values, documents = segment
    return function(keys), function(values), function(documents)


def select_sequences(segment: Segment, indices: Tensor) -> Segment:
    """Copy the sequences at ``indices`` in the batch."""
    return map_segment(lambda part: part.index_select(0, indices.to(part.device)), segment)


def no_tokens(widths: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers, keys and values of no tokens."""
    keys, values = (torch.zeros(0, width) for width in widths)
    return torch.zeros(0, dtype=torch.int64), keys, values


def load_count(state: Mapping[str, Tensor], name: str, least: int) -> int:
    """Return the number of written tokens in a state, at least ``least``."""
    check_shape(f"state_dict[{name + 'written'!r}]", state["written"], ())
    written = int(state["written"])
    if written < least:
        raise ArgumentError(f"state_dict[{name + 'written'!r}]: expected at least {least}, got {written}")
    return written


def copy_segment(state: Mapping[str, Tensor], like: Tensor) -> Segment:
    """Copy a segment from a state, in the dtype and to the device of ``like``."""
    keys, values = (state[name].to(like.device, like.dtype, copy=True) for name in SEGMENT_NAMES[:2])
    return keys, values, state["documents"].to(like.device, torch.int64, copy=True)


def check_segment(state: Mapping[str, Tensor], name: str, count: int | None, widths: tuple[int, int]) -> None:
    """Raise unless a state holds a segment of ``count`` tokens and ``widths``."""
    documents = state["documents"]
    if documents.dtype != torch.int64:
        raise DtypeError(f"state_dict[{name + 'documents'!r}]: expected int64, got {documents.dtype}")
    check_shape(f"state_dict[{name + 'documents'!r}]", documents, (None, count))
    for part, width in zip(SEGMENT_NAMES, widths, strict=False):
        check_shape(f"state_dict[{name + part!r}]", state[part], (*documents.shape, width))
