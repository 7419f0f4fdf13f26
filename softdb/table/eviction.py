"""Eviction clock: the order in which rows are evicted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.pending_checks import is_deferred

__all__ = ["CLOCK_COLUMNS", "EvictionClock", "QueueSampling", "mark_used"]

# Buffer that holds each row's clock reading, by eviction rule. Rows with the lowest readings are evicted first.
CLOCK_COLUMNS = {"lru": "used_at", "oldest": "added_at"}


def mark_used(readings: Tensor, slots: Tensor, now: int) -> None:
    """Set the readings of ``slots`` (-1 is padding) to ``now``, in place.

    Args:
        readings: Reading of each slot, (n,) int64, none above ``now``.
        slots: Slots of any shape.
        now: The reading to set.
    """
    slots = slots.flatten()
    if not is_deferred(slots):
        readings[slots[slots >= 0]] = now
    elif len(readings):  # The host does not wait for the number of slots: padding leaves the reading of slot 0.
        readings.scatter_reduce_(0, slots.clamp(min=0), torch.where(slots >= 0, now, -1), "amax")


@dataclass(frozen=True)
class QueueSampling:
    """Size of an eviction queue.

    Attributes:
        share: Fraction of the rows to queue: the rows with the lowest readings.
        rows: Approximate number of rows whose readings are sorted to estimate the highest reading to queue.
    """

    share: float = 1 / 8
    rows: int = 4096


class EvictionClock:
    """Counter of uses or additions of rows, with a queue of the rows to evict next.

    Args:
        rule: "lru", "oldest", or None for no eviction.

    Attributes:
        column: Name of the buffer with the readings; None for no eviction.
        now: Next reading, above that of every row.
    """

    sampling = QueueSampling()

    def __init__(self, rule: str | None) -> None:
        self.column = None if rule is None else CLOCK_COLUMNS[rule]
        self.now = 0
        self._queue: tuple[Tensor, Tensor] | None = (
            None  # Slots and their readings when queued, in the order of eviction.
        )

    def restart(self, readings: Tensor | None) -> None:
        """Restart the clock above ``readings``, with an empty queue."""
        self._queue = None
        if readings is not None:
            self.now = int(readings.max()) + 1 if len(readings) else 0

    def rows_to_evict(self, readings: Tensor, ids: Tensor, count: int, protected: Tensor) -> Tensor:  # (used,), (used,)
        """Return the slots of the ``count`` rows with the lowest readings.

        Ties go to the lowest slot. ``protected`` slots are not returned. At least ``count`` other rows must exist.

        Most calls examine only the front of the queue, since new readings are higher than all queued ones. An entry is
        skipped if its slot has become free or has another reading: the row was deleted, used or replaced. All slots are
        scanned only when the queue is too short.
        """
        protected = protected.to(ids.device)
        chosen = self._take(readings, ids, count, protected)
        while chosen is None:
            self._fill_queue(readings, ids, count + len(protected))
            chosen = self._take(readings, ids, count, protected)
        return chosen

    def _fill_queue(self, readings: Tensor, ids: Tensor, least: int) -> None:
        """Queue at least ``least`` rows with the lowest readings."""
        sampling = self.sampling
        sample = readings[:: max(1, len(readings) // sampling.rows)].sort().values
        low = readings <= sample[int(sampling.share * len(sample))]
        slots = (low & (ids >= 0)).nonzero().squeeze(-1)
        if len(slots) < least:
            slots = (ids >= 0).nonzero().squeeze(-1)
        readings, order = readings[slots].sort(stable=True)
        self._queue = slots[order], readings

    def _take(self, readings: Tensor, ids: Tensor, count: int, protected: Tensor) -> Tensor | None:
        """Return the first ``count`` queued rows that are valid and not ``protected``.

        Returns:
            Their slots; None if the queue has fewer such rows.
        """
        if self._queue is None:
            return None
        queue, queued_readings = self._queue
        width = 2 * (count + len(protected))
        while True:
            front = queue[:width]
            queued = (readings[front] == queued_readings[:width]) & (ids[front] >= 0)
            chosen = (queued & ~torch.isin(front, protected)).nonzero().squeeze(-1)[:count]
            if len(chosen) == count or width >= len(queue):
                break
            width *= 4
        if len(chosen) < count:
            return None
        first = int(queued.nonzero()[0])
        self._queue = queue[first:], queued_readings[first:]
        return front[chosen]
