"""Record recent queries, and generate queries if there are too few."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.pending_checks import is_deferred

__all__ = ["TUNING_QUERIES", "RecentQueries"]

# Number of recent queries that are kept, and of queries on which a search width is tuned.
TUNING_QUERIES = 256

# Minimum number of recent queries on which a recall is measured.
MIN_QUERIES = 8

# Bounds of the number of nearest rows k for which the recall is measured.
MIN_NEIGHBORS, MAX_NEIGHBORS = 32, 256

# Generated queries are rows plus noise of this many standard deviations of the rows.
QUERY_NOISE = 0.5


class RecentQueries:
    """Sample of recent queries, and the number of neighbors to tune for.

    Attributes:
        latest: Up to `TUNING_QUERIES` queries, (m, d), or None.
        neighbors: Largest k of a search so far, rounded up to a power of two, within bounds.
        since_check: Number of queries since the recall was last measured.
    """

    def __init__(self, latest: Tensor | None = None) -> None:
        self.latest = latest
        self.neighbors = MIN_NEIGHBORS
        self.since_check = 0
        self._recorded: Tensor | None = None  # queries that `record` was called with, until their search

    @property
    def usable_count(self) -> int:
        """Number of queries on which to measure a recall; 0 if there are too few."""
        return 0 if self.latest is None or len(self.latest) < MIN_QUERIES else len(self.latest)

    def record(self, query: Tensor, k: int) -> None:  # (B, d)
        """Record queries before their search."""
        self._add(query, k)
        self._recorded = query

    def record_once(self, query: Tensor, k: int) -> None:  # (B, d)
        """Record queries at their search, unless `record` has just been called with them."""
        if self._recorded is None or query.data_ptr() != self._recorded.data_ptr():
            self._add(query, k)
        self._recorded = None

    def _add(self, query: Tensor, k: int) -> None:
        if len(query) == 0:
            return
        while self.neighbors < min(k, MAX_NEIGHBORS):
            self.neighbors *= 2
        latest = query[:: max(1, len(query) // TUNING_QUERIES)][:TUNING_QUERIES]
        if is_deferred(latest):  # A read on a GPU does not raise for queries with NaN.
            latest = latest[latest.isfinite().all(-1)]
        if self.latest is not None and len(latest) < TUNING_QUERIES and self.latest.dtype == latest.dtype:
            latest = torch.cat([self.latest[len(latest) - TUNING_QUERIES :], latest])
        self.latest = latest.clone()

    def make_tuning_groups(self, rows: Tensor, count: int) -> list[Tensor]:  # (n, d) -> (m, d) each
        """Make groups of queries to tune on: recent queries, then noisy rows."""
        recent = rows[:0] if self.latest is None else self.latest.detach().to(rows.dtype)
        recent = recent[:: max(1, len(recent) // count)][:count]
        generator = torch.Generator("cpu").manual_seed(0)
        wanted = count - len(recent) if len(rows) else 0
        chosen = torch.randint(max(1, len(rows)), (wanted,), generator=generator, device="cpu")
        sample = rows[chosen.to(rows.device)]
        noise = torch.randn(sample.shape, generator=generator, device="cpu").to(sample)
        spread = sample.std(dim=0, correction=0) if len(sample) else 0.0
        generated = sample + noise.mul_(QUERY_NOISE * spread)
        groups = [recent, generated] if len(recent) >= MIN_QUERIES else [torch.cat([recent, generated])]
        return [group for group in groups if len(group)]
