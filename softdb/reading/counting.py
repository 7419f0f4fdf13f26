"""Counting of reads, for eviction and usage.

A read is counted at once, or later by the compiled graph that contains it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from softdb.table.eviction import mark_used
from softdb.table.storage import RowStorage
from softdb.table.usage import count_reads

__all__ = ["ReportedRows", "count_read", "defer_counting", "record_read"]

ReportedRows = list[tuple[Tensor, Tensor]]  # slots and weights

_deferred = threading.local()


def record_read(rows: RowStorage, slots: Tensor, weights: Tensor) -> None:  # of one shape
    """Count a read by the slots that it reports (-1 is padding) and their weights."""
    if not rows.counts_reads:
        return
    with rows.access.counter_lock:
        if rows.evict == "lru":
            mark_used(rows.writable_buffer("used_at"), slots.to(rows.used_at.device), rows.clock.now)
            rows.clock.now += 1
        if rows.track_usage:
            count_reads(rows.writable_buffer("reads"), rows.writable_buffer("weight"), slots, weights, has_padding=True)


@contextmanager
def defer_counting(reported: ReportedRows | None) -> Iterator[None]:
    """Append reads to ``reported`` instead of counting them; None counts at once."""
    _deferred.reported, before = reported, getattr(_deferred, "reported", None)
    try:
        yield
    finally:
        _deferred.reported = before


def count_read(rows: RowStorage, slots: Tensor, weights: Tensor) -> None:
    """Count a read that reports ``slots`` with ``weights``.

    Within `defer_counting`, append slots and weights to its list instead.
    """
    reported = getattr(_deferred, "reported", None)
    if reported is None:
        record_read(rows, slots, weights)
    elif rows.counts_reads:
        reported.append((slots.detach(), weights.detach()))
