"""Keep a base index up with its rows.

Every change of rows is followed: rows that the base no longer holds as they are get hidden in it, and become *pending*.
A row written by `add`, `put`, `update` or `touch` is pending. One that an optimiser may have moved is pending once its
key is further from where the base saw it than a tolerance. Enough pending rows are merged into the base; when too many
of its entries are garbage, it is rebuilt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.errors import IndexBuildError
from softdb.filters import select
from softdb.index.background import BackgroundBuild
from softdb.index.base import Base
from softdb.index.builder import MAX_NORM, BuildPlan, BuildResult, plan_build, run_build
from softdb.index.config import IndexConfig
from softdb.index.faiss_parts import to_vectors
from softdb.index.key_sample import KeySample
from softdb.index.policy import IndexPolicy
from softdb.index.recent_queries import RecentQueries
from softdb.index.tuning import CHECKING_QUERIES, tune_base
from softdb.table.storage import RowStorage

__all__ = ["IndexCosts", "IndexUpkeep"]

# Bypass the base when a step has moved this share of the rows: exact searches are cheaper then than to follow.
BYPASS_SHARE = 1 / 4

# Cost of a build without finding lists, in queries multiplied with every row.
BUILD_COST = 1024

# Rows that made-up queries are taken from when a recall is checked.
QUERY_SOURCE_ROWS = 2**12


@dataclass
class IndexCosts:
    """Count builds, and the seconds spent on an index."""

    builds: int = 0
    search_seconds: float = 0.0
    upkeep_seconds: float = 0.0
    rebuild_seconds: float = 0.0

    @contextmanager
    def count_upkeep(self) -> Iterator[None]:
        """Count the time of a block as upkeep."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.upkeep_seconds += time.perf_counter() - started


class IndexUpkeep:
    """Follow the changes of rows with a base index, pending rows and rebuilds.

    Args:
        config: The index to keep.
        metric: How keys are scored.
        policy: The thresholds.
        costs: What to count costs in.
        moving: Whether optimisers move the keys.
        min_rows: The fewest rows that the configured factory can be built with.

    Attributes:
        base: The base index, or None.
        pending: The slots of rows that the base does not hold as they are.
        exact_slots: The slots that are searched exactly next to the base: pending rows and norm outliers.
        version: The version of the rows that all this describes.
        queries: Recent queries.
        is_bypassed: Whether searches are exact although there is a base.
        bypassed_queries: The number of queries since.
        background: A build under way in a thread of its own, or None.
        error: Why the last build failed, or None.
        error_unreported: Whether no `IndexBuildError` has been raised for it yet.
    """

    def __init__(
        self, config: IndexConfig, metric: str, policy: IndexPolicy, costs: IndexCosts, *, moving: bool, min_rows: int
    ) -> None:
        self.config, self.policy = config, policy
        self._metric, self._moving, self._costs = metric, moving, costs
        self.min_rows = policy.exact_rows if config.factory == "auto" else min_rows
        self.base: Base | None = None
        self._key_sample: KeySample | None = None
        self.pending: Tensor = torch.empty(0, dtype=torch.int64, device="cpu")
        self.exact_slots = self.pending
        self.version = -1
        self.queries = RecentQueries()
        self.background: BackgroundBuild | None = None
        self.error: str | None = None
        self.error_unreported = False
        self._failed_rows = 0  # the number of rows when a build failed
        # A bypassed base is rebuilt once exact searches have cost this many builds. The backoff doubles with each
        # bypass, and halves with each step that the base could follow.
        self.is_bypassed, self.bypassed_queries, self._rebuild_backoff = False, 0, 1

    @property
    def usable_base(self) -> Base | None:
        """The base that searches may use."""
        return None if self.is_bypassed else self.base

    def follow(self, rows: RowStorage, keys: Tensor) -> None:
        """Follow every change since the last call, and build or merge where that is due."""
        version, before = rows.version, self.version
        if version == before:
            return
        if self.background is not None and self.background.is_done:
            self._adopt(self.background)
        if self.base is not None:
            with self._costs.count_upkeep():
                self.base.resize(rows.capacity)
                if not self.is_bypassed:
                    self._hide_changes(self.base, rows, keys)
        self.version = version  # a signal handler may have written meanwhile
        self._build_or_merge_pending(rows, keys)
        self._list_exact_slots()
        self._follow_sample(rows, keys, before)

    def refresh(self, rows: RowStorage, keys: Tensor, *, wait: bool) -> None:
        """Merge every pending row, and adopt a background build once it is done."""
        self.follow(rows, keys)
        self._build_or_merge_pending(rows, keys, now=True)
        if self.background is not None and (wait or self.background.is_done):
            self._adopt(self.background)
            self.follow(rows, keys)
            self._build_or_merge_pending(rows, keys, now=True)
        self._list_exact_slots()

    def build(self, rows: RowStorage, keys: Tensor) -> None:
        """Build a base at once, if there are enough rows."""
        self.version = rows.version
        if self.config.factory != "Flat" and len(rows) >= self.min_rows:
            self._install(run_build(self._plan_build(rows, keys, None)))
        self._list_exact_slots()
        self._follow_sample(rows, keys, self.version)

    def has_stale_sample(self, keys: Tensor) -> bool:
        """Test whether sampled keys were written to uncounted, as by ``.data``."""
        sample = None if self.is_bypassed else self._key_sample
        return sample is not None and sample.is_stale(keys, self._metric, self.config.tolerance)

    def count_pending(self, rows: RowStorage, keys: Tensor) -> int:
        """Count the rows that the next search compares exactly next to a base."""
        if self.base is None:
            return 0
        if self.is_bypassed:
            return len(rows)
        return len(self._pending_with(self._find_outdated(self.base, rows, keys)[0], self.base, rows))

    def raise_unreported(self) -> None:
        """Raise for the last build, if it failed and no call has raised for it yet."""
        unreported, self.error_unreported = self.error_unreported, False
        if unreported:
            raise IndexBuildError(
                f"the index could not be built, and searches are exact until there are twice as many rows: {self.error}"
            )

    # -- changes ---------------------------------------------------------------------------------------------

    def _hide_changes(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Make changed rows pending, or bypass the base where most rows have moved."""
        outdated, moved = self._find_outdated(base, rows, keys)
        if moved > BYPASS_SHARE * len(rows):
            self.is_bypassed, self.bypassed_queries = True, 0
            self._rebuild_backoff *= 2
            return
        self._rebuild_backoff = max(1, self._rebuild_backoff // 2)
        base.hide(outdated.cpu())
        self.pending = self._pending_with(outdated, base, rows)

    def _find_outdated(self, base: Base, rows: RowStorage, keys: Tensor) -> tuple[Tensor, int]:
        """Return outdated slots that the base shows, and how many moved unwritten."""
        changed = rows.changed_since(self.version, keys=True)
        written = rows.keys_written_at[changed] > self.version
        moving = changed[~written & (changed < len(base.entry_of))]
        visible = moving[base.is_visible(moving.cpu()).to(moving.device)]
        moved = base.movement.moved_slots(visible, keys, self._metric, self.config.tolerance)
        return torch.cat([changed[written], moved]), len(moved)

    def _pending_with(self, changed: Tensor, base: Base, rows: RowStorage) -> Tensor:
        """Add changed slots to the pending ones, without free slots and outliers."""
        pending: Tensor = torch.cat([self.pending.to(changed.device), changed]).unique()
        pending = pending[rows.ids[pending] >= 0]
        if not len(base.norm_outliers):
            return pending
        return pending[~torch.isin(pending, base.norm_outliers.to(pending.device))]

    def _list_exact_slots(self) -> None:
        self.exact_slots = self.pending
        if self.base is not None and len(self.base.norm_outliers):
            outliers = self.base.norm_outliers.to(self.pending.device)
            self.exact_slots = torch.cat([self.pending, outliers]).sort().values

    def _follow_sample(self, rows: RowStorage, keys: Tensor, version: int) -> None:
        if self._key_sample is not None:
            self._key_sample.follow(rows, keys, version)

    # -- merges ----------------------------------------------------------------------------------------------

    def _build_or_merge_pending(self, rows: RowStorage, keys: Tensor, *, now: bool = False) -> None:
        """Build, or merge pending rows, where due; ``now`` for any reason."""
        base = self.base
        enough = max(2 * self._failed_rows, self.min_rows)
        if self.config.factory == "Flat" or (base is None and len(rows) < enough):
            self._drop()
        elif base is None:
            self._rebuild(rows, keys, None)
        else:
            garbage = base.visibility.hidden > self.config.garbage * base.entries
            outgrown = base.has_outgrown_lists(len(rows))
            # Well below the number that it was built for, so that a row more or less does not build it again and again.
            if 2 * len(rows) < enough or (len(rows) < enough and (garbage or outgrown)):
                self._drop()
            elif self.is_bypassed:
                if now or self.bypassed_queries >= self._rebuild_backoff * (BUILD_COST + base.lists):
                    self._rebuild(rows, keys, None if outgrown else base)
            elif (garbage or outgrown) and self.background is None:
                self._rebuild(rows, keys, None if outgrown else base)
            elif len(self.pending) > (
                0 if now else min(self.policy.pending_rows, self.policy.pending_share * base.entries)
            ):
                self._merge_pending(base, rows, keys)

    def _drop(self) -> None:
        self.base, self._key_sample, self.is_bypassed = None, None, False
        self.pending = torch.empty(0, dtype=torch.int64, device="cpu")

    def _merge_pending(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Merge finite pending rows into the base or the norm outliers."""
        with self._costs.count_upkeep():
            check = base.merged_rows + len(self.pending) > base.checking_share * base.entries
            if check:  # tuning decides again which rows are norm outliers: none is at its start
                outliers, base.norm_outliers = base.norm_outliers, base.norm_outliers[:0]
                self.pending = self._pending_with(outliers.to(self.pending.device), base, rows)
            vectors = to_vectors(keys.index_select(0, self.pending), self._metric)
            norms = torch.linalg.vector_norm(vectors, dim=-1)
            finite = norms < MAX_NORM
            inside = finite if check else norms < min(MAX_NORM, base.outlier_norm)
            try:
                if bool(inside.all()):
                    base.merge(self.pending.cpu(), vectors)
                else:
                    base.merge(self.pending[inside].cpu(), vectors[inside])
            except RuntimeError:  # some indexes cannot be appended to
                base.recall = None
            else:
                base.norm_outliers = torch.cat([base.norm_outliers, self.pending[~inside & finite].cpu()])
                self.pending = self.pending[~finite]
                if check:
                    self._tune_base(base, rows, keys)
        if base.recall is None:
            self._rebuild(rows, keys, None)

    def _tune_base(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Tune the base to the rows as they are now."""
        live = rows.live_slots()
        source = to_vectors(keys[live[:: max(1, len(live) // QUERY_SOURCE_ROWS)]], self._metric)
        groups = self.queries.make_tuning_groups(source, CHECKING_QUERIES)
        base.tuned_queries, self.queries.since_check = self.queries.usable_count, 0
        everything = select(rows, (), None, None)
        tune_base(base, groups, keys, self._metric, everything, self.config.recall, self.queries.neighbours)

    # -- builds ----------------------------------------------------------------------------------------------

    def _rebuild(self, rows: RowStorage, keys: Tensor, old: Base | None) -> None:
        """Build a base, now or in the background; reuse the lists of an ``old`` one."""
        if not self.config.background:
            self._install(run_build(self._plan_build(rows, keys, old)))
        elif self.background is None:
            self.background = BackgroundBuild(self._plan_build(rows, keys, old))

    def _plan_build(self, rows: RowStorage, keys: Tensor, old: Base | None) -> BuildPlan:
        return plan_build(
            rows,
            keys,
            self.queries,
            self.config,
            self._metric,
            self.policy,
            copied=self._moving or self.config.background,
            old=old,
            keep_lists=not self.is_bypassed,
        )

    def _adopt(self, background: BackgroundBuild) -> None:
        """Install what was built in the background, from rows as they were then."""
        result = background.wait()  # a signal may interrupt it: then the build is still under way
        self.background = None
        if result is not None:
            self._install(result)
            self.version = result.version

    def _install(self, result: BuildResult) -> None:
        self._costs.rebuild_seconds += result.seconds
        self.base, self.error, self.is_bypassed, self.pending = result.base, result.error, False, result.left_out
        self._key_sample = None if result.base is None else KeySample(result.base)
        self.error_unreported = result.base is None
        if result.base is None:
            self._failed_rows = result.rows
        else:
            self._costs.builds += 1
