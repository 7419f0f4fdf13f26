"""Count the reads of rows: at once, or later where a compiled graph does so itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from softdb.table.storage import RowStorage
from softdb.table.usage import count_reads

__all__ = ["Reported", "count_read", "deferring", "note_read"]

Reported = list[tuple[Tensor, Tensor]]  # slots and weights

_deferred = threading.local()


def note_read(rows: RowStorage, slots: Tensor, weights: Tensor) -> None:  # of one shape
    """Count a read that reports ``slots``, -1 for none, with ``weights``."""
    if not rows.counts_reads:
        return
    reported = slots >= 0
    slots = slots[reported]
    with rows.access.counter_lock:
        if rows.evict == "lru":
            rows.writable_buffer("used_at")[slots.to(rows.used_at.device)] = rows.clock.now
            rows.clock.now += 1
        if rows.track_usage:
            count_reads(rows.writable_buffer("reads"), rows.writable_buffer("weight"), slots, weights[reported])


@contextmanager
def deferring(reported: Reported | None) -> Iterator[None]:
    """Have `count_read` add to ``reported``, if that is a list, what it is to count."""
    _deferred.reported, before = reported, getattr(_deferred, "reported", None)
    try:
        yield
    finally:
        _deferred.reported = before


def count_read(rows: RowStorage, slots: Tensor, weights: Tensor) -> None:
    """Count a read that reports ``slots`` with ``weights``, unless a graph is to count it later."""
    reported = getattr(_deferred, "reported", None)
    if reported is None:
        note_read(rows, slots, weights)
    elif rows.counts_reads:
        reported.append((slots.detach(), weights.detach()))
