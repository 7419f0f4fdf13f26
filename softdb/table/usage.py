"""How rows are used: counters of reads, and of the weights that rows had there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.errors import NotApplicableError

__all__ = ["Usage", "check_tracking", "count_reads", "keep_sum_dtype", "new_counters", "reset_counters"]


@dataclass(frozen=True, eq=False)
class Usage:
    """How the rows have been read, as `SoftKVStore.usage` returns it: copies, in the order of ``store.ids``.

    Attributes:
        reads: (n,) int64: the number of queries that reported the row: how many times its id stood in ``read.ids``, or
            it had weight in an exact read without ``k``.
        weight: (n,) float64: the sum of its weights there.
    """

    reads: Tensor
    weight: Tensor


def new_counters(rows: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Create counters of zero.

    Returns:
        How often each row was read, (rows,) int64, and the sum of its weights, (rows,) float64.
    """
    reads = torch.zeros(rows, dtype=torch.int64, device=device)
    return reads, torch.zeros(rows, dtype=torch.float64, device=device)


@torch.no_grad()
def count_reads(reads: Tensor, weight: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Add one read of each of ``slots``, and its weight, to the counters in place.

    Equal to::

        for slot, w in zip(slots.flatten(), weights.flatten()):
            reads[slot] += 1
            weight[slot] += w

    Args:
        reads: (n,) int64.
        weight: (n,) float64.
        slots: Rows that reads report, of any shape; a row counts as often as it is named. No padding.
        weights: Their weights, of the same shape.
    """
    slots = slots.flatten()
    reads.index_add_(0, slots, torch.ones_like(slots))
    weight.index_add_(0, slots, weights.detach().flatten().to(weight.dtype))


def reset_counters(reads: Tensor, weight: Tensor, slots: slice | Tensor = slice(None)) -> None:
    """Set the counters of ``slots`` to zero, in place."""
    reads[slots] = 0
    weight[slots] = 0.0


def keep_sum_dtype(before: Tensor, converted: Tensor) -> Tensor:
    """Return a converted sum of weights in its former dtype.

    `torch.nn.Module.half` and the like convert every floating-point buffer, but a sum over many reads would stop
    rising in a narrow dtype.
    """
    return converted if converted.dtype == before.dtype else before.to(converted.device)


def check_tracking(track_usage: bool, owner: str) -> None:
    """Raise `NotApplicableError` unless ``owner``, a "store" or "layer", tracks usage."""
    if not track_usage:
        raise NotApplicableError(
            f"track_usage: expected True to know how rows are used, got False; make the {owner} with track_usage=True"
        )
