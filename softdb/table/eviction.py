"""The eviction clock: in which order rows make room for others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CLOCK_COLUMNS", "EvictionClock", "QueueSampling"]

# The buffer that holds the clock's reading for each row, by the rule: the row with the lowest is evicted first.
CLOCK_COLUMNS = {"lru": "used_at", "oldest": "added_at"}


@dataclass(frozen=True)
class QueueSampling:
    """How many rows an eviction queue holds.

    Attributes:
        share: The share of the rows, those with the lowest readings.
        rows: The readings of about so many rows are sorted to find that share.
    """

    share: float = 1 / 8
    rows: int = 4096


class EvictionClock:
    """Counts uses or additions of rows, and queues the rows whose last one is longest ago.

    Args:
        rule: "lru", "oldest", or None where nothing is evicted.

    Attributes:
        now: Above the reading of every row.
    """

    sampling = QueueSampling()

    def __init__(self, rule: str | None) -> None:
        self.column = None if rule is None else CLOCK_COLUMNS[rule]
        self.now = 0
        self._queue: tuple[Tensor, Tensor] | None = None  # slots and readings when queued, the first to go first

    def restart(self, readings: Tensor | None) -> None:
        """Continue above ``readings``, with no queue."""
        self._queue = None
        if readings is not None:
            self.now = int(readings.max()) + 1 if len(readings) else 0

    def rows_to_evict(self, readings: Tensor, ids: Tensor, count: int, spared: Tensor) -> Tensor:  # (used,), (used,)
        """Return the slots of the ``count`` rows to evict, of equals the lowest; ``spared`` slots stay.

        There must be as many. Looks at every slot only once in a while: whatever happens to a row gives it a later
        reading than all in the queue have, or frees its slot, so that only the front of the queue is compared.
        """
        spared = spared.to(ids.device)
        chosen = self._take(readings, ids, count, spared)
        while chosen is None:
            self._fill_queue(readings, ids, count + len(spared))
            chosen = self._take(readings, ids, count, spared)
        return chosen

    def _fill_queue(self, readings: Tensor, ids: Tensor, least: int) -> None:
        """Queue the rows with the lowest readings, ``least`` of them or more."""
        sampling = self.sampling
        sample = readings[:: max(1, len(readings) // sampling.rows)].sort().values
        low = readings <= sample[int(sampling.share * len(sample))]
        slots = (low & (ids >= 0)).nonzero().squeeze(-1)
        if len(slots) < least:
            slots = (ids >= 0).nonzero().squeeze(-1)
        readings, order = readings[slots].sort(stable=True)
        self._queue = slots[order], readings

    def _take(self, readings: Tensor, ids: Tensor, count: int, spared: Tensor) -> Tensor | None:
        """Return the first ``count`` rows that are still queued and not ``spared``; None if there are fewer."""
        if self._queue is None:
            return None
        queue, queued_readings = self._queue
        width = 2 * (count + len(spared))
        while True:
            front = queue[:width]
            queued = (readings[front] == queued_readings[:width]) & (ids[front] >= 0)
            chosen = (queued & ~torch.isin(front, spared)).nonzero().squeeze(-1)[:count]
            if len(chosen) == count or width >= len(queue):
                break
            width *= 4
        if len(chosen) < count:
            return None
        gone = int(queued.nonzero()[0])
        self._queue = queue[gone:], queued_readings[gone:]
        return front[chosen]
