"""How rows are used: counters of reads, and the eviction clock of stores that evict the least recently used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.errors import NotApplicableError
from softdb.table.storage import RowStorage

__all__ = ["Usage", "check_tracking", "copy_usage", "note_read"]


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


def check_tracking(track_usage: bool) -> None:
    """Raise unless usage is tracked."""
    if not track_usage:
        raise NotApplicableError(
            "track_usage: expected True to know how rows are used, got False; make the store with track_usage=True"
        )


def note_read(rows: RowStorage, slots: Tensor, weights: Tensor) -> None:  # of one shape
    """Count a read that reports ``slots``, -1 for none, with ``weights``."""
    if not rows.counts_reads:
        return
    reported = slots >= 0
    slots = slots[reported]
    with rows.access.alone:
        if rows.evict == "lru":
            rows.own("used_at")[slots.to(rows.used_at.device)] = rows.clock.now
            rows.clock.now += 1
        if rows.track_usage:
            rows.own("reads").index_add_(0, slots, torch.ones_like(slots))
            rows.own("weight").index_add_(0, slots, weights.detach()[reported].to(rows.weight.dtype))


def copy_usage(rows: RowStorage) -> Usage:
    """Copy the counters of the rows, in slot order."""
    if rows.ids.is_meta:
        return Usage(rows.reads.new_empty(len(rows)), rows.weight.new_empty(len(rows)))
    slots = rows.live_slots()
    with rows.access.alone:
        return Usage(rows.reads[slots], rows.weight[slots])
