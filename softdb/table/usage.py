"""Usage counters of rows: number of reads and sum of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.errors import NotApplicableError
from softdb.pending_checks import is_deferred

__all__ = [
    "COUNTER_COLUMNS",
    "Usage",
    "check_tracking",
    "count_reads",
    "keep_sum_dtype",
    "new_counters",
    "reset_counters",
]

# Buffers of a store that hold the counters: the number of reads, and the sum of the weights.
COUNTER_COLUMNS = ("reads", "weight")


@dataclass(frozen=True, eq=False)
class Usage:
    """Copies of the usage counters, in the order of ``store.ids``.

    `SoftKVStore.usage` returns them.

    Attributes:
        reads: (n,) int64: number of queries that counted the row. A query counts the rows in its ``read.ids``. An exact
            read without ``k`` reports no ids: each query counts the rows with weight above 0. With the softmax
            normalizer, it counts none.
        weight: (n,) float64: sum of the row's weights over the same queries.
    """

    reads: Tensor
    weight: Tensor


def new_counters(rows: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Create counters that are zero.

    Returns:
        Number of reads of each row, (rows,) int64, and sum of its weights, (rows,) float64.
    """
    reads = torch.zeros(rows, dtype=torch.int64, device=device)
    return reads, torch.zeros(rows, dtype=torch.float64, device=device)


@torch.no_grad()
def count_reads(reads: Tensor, weight: Tensor, slots: Tensor, weights: Tensor, *, has_padding: bool = False) -> None:
    """Add one read per slot, and its weight, to the counters in place.

    Equal to::

        for slot, w in zip(slots.flatten(), weights.flatten()):
            reads[slot] += 1
            weight[slot] += w

    Args:
        reads: (n,) int64.
        weight: (n,) float64.
        slots: Slots of the reported rows, of any shape. A slot is counted each time that it occurs.
        weights: Their weights, of the same shape.
        has_padding: Whether some slots may be -1, which is not counted.
    """
    slots, weights = slots.flatten(), weights.detach().flatten()
    count = torch.ones_like(slots)
    if has_padding and is_deferred(slots):  # The host does not wait for the number of reported rows.
        if len(reads) == 0:
            return
        reported = (slots >= 0) & ~weights.isnan()  # The weights of a query with NaN would remain in the sums.
        slots, count, weights = slots.clamp(min=0), reported.to(slots.dtype), weights.masked_fill(~reported, 0.0)
    elif has_padding:
        reported = slots >= 0
        slots, count, weights = slots[reported], count[reported], weights[reported]
    reads.index_add_(0, slots, count)
    weight.index_add_(0, slots, weights.to(weight.dtype))


def reset_counters(reads: Tensor, weight: Tensor, slots: slice | Tensor = slice(None)) -> None:
    """Set the counters of ``slots`` to zero, in place."""
    reads[slots] = 0
    weight[slots] = 0.0


def keep_sum_dtype(before: Tensor, converted: Tensor) -> Tensor:
    """Convert a sum of weights back to its former dtype, on its present device.

    `torch.nn.Module.half` and similar methods convert every floating-point buffer, but a sum in a narrow dtype stops
    growing once its terms are below its precision.
    """
    return converted if converted.dtype == before.dtype else before.to(converted.device)


def check_tracking(track_usage: bool, owner: str) -> None:
    """Raise `NotApplicableError` unless a "store" or "layer" tracks usage."""
    if not track_usage:
        raise NotApplicableError(
            f"track_usage: expected True to read usage counters, got False; make the {owner} with track_usage=True, or "
            f"call {owner}.track_usage_()"
        )
