"""Attention of a `ContextMemory` over its past and the current segment."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from softdb._checks import INTEGER_DTYPES, describe
from softdb.errors import ArgumentError, DeviceError, DtypeError, ShapeError, StaleReadError, TransformError
from softdb.functional import soft_read
from softdb.layers.context_state import ContextState
from softdb.pending_checks import is_deferred
from softdb.reading.result import Read, merge
from softdb.transforms import (
    check_no_tangent,
    disable_compile,
    is_active,
    is_batched,
    is_forward_mode,
    is_wrapped,
    suspend_transforms,
    unwrap_tensors,
)

__all__ = ["UNTRACED_MESSAGE", "attend", "attend_outside"]


UNTRACED_MESSAGE = (
    "softdb: ContextMemory: expected to run outside of graphs of torch.compile and torch.export, since it stores the "
    "tokens of each call; leave out fullgraph=True"
)


def attend(
    past: ContextState,
    queries: Tensor,  # (batch, heads, n, key_dim)
    keys: Tensor,  # (batch, n, key_dim)
    values: Tensor,  # (batch, n, value_dim)
    documents: Tensor | None,
    dtype: torch.dtype | None,
) -> Read:
    """Read a segment and the past; store the segment in ``dtype`` unless it is None."""
    if is_forward_mode():
        check_no_tangent(queries, keys, values)
    if is_active():
        return _attend_under_transform(past, queries, keys, values, documents, dtype)
    batch, count = keys.shape[:2]
    is_recomputing = torch._C._current_graph_task_id() != -1  # Only activation checkpointing runs within a backward.
    documents = _check_documents(documents, batch, count, keys.device)
    if not past.is_loaded or is_recomputing or batch == 0:
        _check_batch(past, batch)
    if is_recomputing and not past.is_recompute(keys):
        raise StaleReadError(
            "x: expected activation checkpointing to recompute the last segment that the memory read, got another one, "
            "so the result would differ; call backward() before the next segment"
        )
    read = _attend_to_segment(queries, keys, values, documents)  # Checks the numbers before the past changes.
    if past.batch not in (0, batch):
        warnings.warn(
            f"x: expected {past.batch} sequences, as in the loaded past of the ContextMemory, got {batch}; the past is "
            "dropped; call reset() after load_state_dict() before new sequences",
            UserWarning,
            stacklevel=2,
        )
        past.clear()
    if not is_recomputing:
        past.flush_segment()
        past.record_segment(keys)
    before = past.read(queries, documents)
    if before is not None:
        read = merge([before, read])
    if dtype is not None and not is_recomputing and batch:
        past.remember(keys, values, documents, dtype)
    return read


def _attend_under_transform(
    past: ContextState,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Tensor | None,
    dtype: torch.dtype | None,
) -> Read:
    """Read a segment and the past under a transform of torch.func.

    Tokens are stored as plain tensors, detached from the transform.
    """
    if dtype is not None and any(map(is_batched, (keys, values))):
        raise TransformError(
            "write: expected False under torch.vmap, since a ContextMemory cannot store a segment for each sample; "
            "pass write=False, or pass the samples as sequences of x"
        )
    if is_wrapped(documents):
        raise TransformError(
            "documents: expected a tensor that no transform of torch.func wraps; pass documents from outside of the "
            "transformed function"
        )
    batch, count = keys.shape[:2]
    with suspend_transforms():
        _check_batch(past, batch)
        documents = _check_documents(documents, batch, count, keys.device)
        past.flush_segment()
    read = _attend_to_segment(queries, keys, values, documents)
    before = past.read(queries, documents)
    if before is not None:
        read = merge([before, read])
    if dtype is not None and batch:
        kept = unwrap_tensors("keys", keys), unwrap_tensors("values", values)
        with suspend_transforms():
            past.remember(*kept, documents, dtype)
    return read


def _check_batch(past: ContextState, batch: int) -> None:
    """Raise unless the past is empty or has ``batch`` sequences."""
    if past.batch not in (0, batch):
        raise ShapeError(
            f"x: expected {past.batch} sequences, as in the past, got {batch}; call reset() before new sequences"
        )


def _attend_to_segment(queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None) -> Read:
    """Compute causal attention within a segment, (batch, heads, n)."""
    count = keys.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool, device=keys.device).tril()
    if documents is not None:
        own = documents[:, None, :, None]
        mask = mask & (own == documents[:, None, None, :]) & (own >= 0)
    return soft_read(queries, keys.unsqueeze(1), values.unsqueeze(1), mask=mask)


def _check_documents(documents: object, batch: int, count: int, device: torch.device) -> Tensor | None:
    """Check ``documents`` and return them as (batch, 1 or n)."""
    if documents is None:
        return None
    if not isinstance(documents, Tensor) or documents.dtype not in INTEGER_DTYPES:
        raise DtypeError(f"documents: expected an int64 tensor, got {describe(documents)}")
    if documents.is_meta:
        raise DeviceError("documents: expected a tensor with data, got one on the meta device; pass one with data")
    if documents.shape not in ((batch,), (batch, count)):
        raise ShapeError(
            f"documents: expected shape ({batch},) or ({batch}, {count}), one number per sequence or per token, "
            f"got {tuple(documents.shape)}"
        )
    # On a GPU the host would wait; lower numbers count as padding there.
    if documents.numel() and not is_deferred(documents) and int(documents.min()) < -1:
        raise ArgumentError(f"documents: expected numbers of at least 0, or -1 for padding, got {int(documents.min())}")
    return documents.to(device, torch.int64).reshape(batch, -1)


attend_outside = disable_compile(UNTRACED_MESSAGE)(attend)
