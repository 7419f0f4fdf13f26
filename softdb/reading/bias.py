"""Check the biases of reads, and convert them to the form of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from softdb._checks import check_device, check_float_tensor, describe, is_broadcastable
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.kernels.bias import ScoreBias, separate_hidden_rows
from softdb.scoring.normalizers import is_sparse
from softdb.table.storage import RowStorage

__all__ = ["check_mask", "check_mask_type", "prepare_bias", "split_mask"]


def prepare_bias(
    rows: RowStorage, bias: Tensor, leading: Sequence[int], dtype: torch.dtype
) -> tuple[ScoreBias, Tensor | None]:
    """Check the bias of a read of a store, and order it by slot.

    Args:
        rows: The rows of the table.
        bias: As for `softdb.SoftKVStore.read`.
        leading: Leading shape of the query.
        dtype: Dtype of the read.

    Returns:
        The bias, and the slots that it leaves visible, bool broadcastable to (1, B, used); None for all slots.
    """
    check_float_tensor("bias", bias, (-1,), rows.ids.device)
    if not is_broadcastable(bias.shape, (*leading, len(rows))):
        raise ShapeError(
            f"bias: expected a shape broadcastable to {(*leading, len(rows))}, one number per row in the order of "
            f"store.ids, got {tuple(bias.shape)}"
        )
    numbers, visible = separate_hidden_rows("bias", bias, dtype, rows.pending_checks)
    own = ScoreBias(_to_slots(rows, _fold(numbers, leading), 0.0))
    return own, None if visible is None else _to_slots(rows, _fold(visible, leading), True)


def _fold(numbers: Tensor, leading: Sequence[int]) -> Tensor:  # (..., n) -> (1, B, n)
    """Fold the leading dimensions into one; size 1 is kept."""
    if math.prod(numbers.shape[:-1]) == 1:
        return numbers.reshape(1, 1, -1)
    return numbers.expand(*leading, numbers.shape[-1]).reshape(1, math.prod(leading), numbers.shape[-1])


def _to_slots(rows: RowStorage, numbers: Tensor, fill: float | bool) -> Tensor:  # (1, B, n) -> (1, B, used)
    """Convert numbers by row to numbers by slot, with ``fill`` at empty slots."""
    if rows.live_mask() is None or numbers.shape[-1] == 1:
        return numbers
    return numbers.new_full((*numbers.shape[:-1], rows.used), fill).index_copy(-1, rows.live_slots(), numbers)


def check_mask_type(mask: Tensor, normalizer: str) -> None:
    """Raise unless ``mask`` is bool, or floating-point and supported."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise DtypeError(
            "mask: expected a bool tensor, True where a row may be seen, or a floating-point tensor that is added to "
            f"the scores, got {describe(mask)}"
        )
    if mask.dtype != torch.bool and is_sparse(normalizer):
        raise ArgumentError(
            f"mask: expected a bool tensor with normalizer={normalizer!r}, which supports no bias, got {mask.dtype}"
        )


def check_mask(mask: Tensor, normalizer: str, shape: Sequence[int], device: torch.device) -> None:
    """Raise unless ``mask`` is a mask of a pure read, except for its numbers.

    Args:
        mask: As for `softdb.functional.soft_read`.
        normalizer: Name of the normalizer.
        shape: Shape that the mask must be broadcastable to.
        device: Device that the mask must be on.
    """
    check_mask_type(mask, normalizer)
    if mask.dtype != torch.bool:
        check_float_tensor("mask", mask, (-1,))
    check_device("mask", mask, device)
    if not is_broadcastable(mask.shape, shape):
        raise ShapeError(f"mask: expected a shape broadcastable to {tuple(shape)}, got {tuple(mask.shape)}")


def split_mask(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Split the mask of a pure read into a bias and a bool mask.

    Args:
        mask: A mask that `check_mask` has accepted, or None.
        dtype: Dtype of the read.

    Returns:
        Finite numbers in ``dtype`` to add to the scores, or None; and a bool mask of the rows that may be seen, or
        None.
    """
    if mask is None or mask.dtype == torch.bool:
        return None, mask
    return separate_hidden_rows("mask", mask, dtype)
