"""Keep a base index up to date with the rows.

A row that has changed since the base index merged it is hidden there, and becomes *pending*. A row written by `add`,
`put`, `update` or `touch` is pending immediately. A row whose key an optimizer may have moved is pending if the key is
further than a tolerance from the merged key. Pending rows are merged into the base index when their number reaches a
threshold; the base index is rebuilt when too many of its entries are garbage.
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
from softdb.pending_checks import is_deferred
from softdb.table.storage import RowStorage

__all__ = ["IndexCosts", "IndexUpkeep"]

# Bypass the base index when more than this fraction of the rows has moved between two updates of the index. Exact
# searches are cheaper then.
BYPASS_FRACTION = 1 / 4

# Cost of a build, except the assignment of rows to lists. The unit is the cost of multiplying one query with every row.
BUILD_COST = 1024

# Number of rows from which queries are generated when the base index is tuned again.
QUERY_SOURCE_ROWS = 2**12


@dataclass
class IndexCosts:
    """Number of builds, and seconds spent on an index."""

    builds: int = 0
    search_seconds: float = 0.0
    upkeep_seconds: float = 0.0
    rebuild_seconds: float = 0.0

    @contextmanager
    def count_upkeep(self) -> Iterator[None]:
        """Add the duration of a ``with`` block to the upkeep."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.upkeep_seconds += time.perf_counter() - started


class IndexUpkeep:
    """Base index and pending rows, which are updated as rows change.

    Args:
        config: Configuration of the index.
        metric: Metric of the scores.
        policy: Thresholds of the index.
        costs: Costs to which builds and upkeep are added.
        moving: Whether optimizers may move the keys.
        min_rows: Minimum number of rows for a build with the configured factory.

    Attributes:
        base: Base index, or None.
        pending: Slots of the pending rows.
        exact_slots: Slots that are searched exactly in addition to the base index: pending rows and norm outliers.
        version: Version of the rows at the last update.
        queries: Recent queries.
        is_bypassed: Whether searches are exact although there is a base index.
        bypassed_queries: Number of queries since the base index was bypassed.
        background: Background build in progress, or None.
        error: Error of the last build, or None.
        error_unreported: Whether the error has not been raised as `IndexBuildError` yet.
    """

    def __init__(
        self, config: IndexConfig, metric: str, policy: IndexPolicy, costs: IndexCosts, *, moving: bool, min_rows: int
    ) -> None:
        self.config, self.policy = config, policy
        self._metric, self._moving, self._costs = metric, moving, costs
        self._min_rows = min_rows
        self.base: Base | None = None
        self._key_sample: KeySample | None = None
        self.pending: Tensor = torch.empty(0, dtype=torch.int64, device="cpu")
        self.exact_slots = self.pending
        self.version = -1
        self.queries = RecentQueries()
        self.background: BackgroundBuild | None = None
        self.error: str | None = None
        self.error_unreported = False
        self._failed_rows = 0  # number of rows when a build failed
        # A bypassed base index is rebuilt when exact searches have cost as much as `_rebuild_backoff` builds. Each
        # bypass doubles this number, and each update without a bypass halves it.
        self.is_bypassed, self.bypassed_queries, self._rebuild_backoff = False, 0, 1

    @property
    def usable_base(self) -> Base | None:
        """Base index that searches may use, or None."""
        return None if self.is_bypassed else self.base

    def min_rows(self, keys: Tensor) -> int:
        """Return the minimum number of rows for a build, by the device of the keys."""
        if self.config.factory != "auto":
            return self._min_rows
        return self.policy.gpu_exact_rows if is_deferred(keys) else self.policy.exact_rows

    def has_to_watch(self, rows: RowStorage, keys: Tensor) -> bool:
        """Return whether queries are recorded, since there is a base index, or may be one.

        On a GPU, queries are not recorded below the number of rows for a build: a read then launches no kernels for the
        index, and CUDA graphs may capture it.
        """
        if self.config.factory == "Flat":
            return False
        has_index = self.base is not None or self.background is not None
        return has_index or not is_deferred(keys) or len(rows) >= self.min_rows(keys)

    def update(self, rows: RowStorage, keys: Tensor) -> None:
        """Update the index with every change since the last call.

        Build the base index or merge pending rows if due.
        """
        version, before = rows.version, self.version
        if version == before:
            return
        if self.background is not None and self.background.is_done:
            self._install_background(self.background)
        if self.base is not None:
            with self._costs.count_upkeep():
                self.base.resize(rows.capacity)
                if not self.is_bypassed:
                    self._hide_changes(self.base, rows, keys)
        self.version = version  # not rows.version, which a signal handler may have raised since
        self._build_or_merge_pending(rows, keys)
        self._list_exact_slots()
        self._update_sample(rows, keys, before)

    def refresh(self, rows: RowStorage, keys: Tensor, *, wait: bool) -> None:
        """Merge all pending rows, and install a finished background build.

        With ``wait``, wait for a background build in progress.
        """
        self.update(rows, keys)
        self._build_or_merge_pending(rows, keys, now=True)
        if self.background is not None and (wait or self.background.is_done):
            self._install_background(self.background)
            self.update(rows, keys)
            self._build_or_merge_pending(rows, keys, now=True)
        self._list_exact_slots()

    def build(self, rows: RowStorage, keys: Tensor) -> None:
        """Build a base index in this thread, if there are enough rows."""
        self.version = rows.version
        if self.config.factory != "Flat" and len(rows) >= self.min_rows(keys):
            self._install(run_build(self._plan_build(rows, keys, None)))
        self._list_exact_slots()
        self._update_sample(rows, keys, self.version)

    def has_stale_sample(self, keys: Tensor) -> bool:
        """Return whether sampled keys have been changed by unknown writes."""
        sample = None if self.is_bypassed else self._key_sample
        return sample is not None and sample.is_stale(keys, self._metric, self.config.tolerance)

    def count_pending(self, rows: RowStorage, keys: Tensor) -> int:
        """Count the rows that will be pending at the next search."""
        if self.base is None:
            return 0
        if self.is_bypassed:
            return len(rows)
        return len(self._combine_pending(self._find_changed(self.base, rows, keys)[0], self.base, rows))

    def raise_unreported(self) -> None:
        """Raise the error of the last build, unless it has been raised before.

        Raises:
            IndexBuildError: The last build failed.
        """
        unreported, self.error_unreported = self.error_unreported, False
        if unreported:
            raise IndexBuildError(
                f"index: the build failed ({self.error}); top-k reads use exact search until the number of rows "
                "doubles; choose another factory, or free memory and call build_index()"
            )

    # -- changes ---------------------------------------------------------------------------------------------

    def _hide_changes(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Make changed rows pending, or bypass the base index if many rows moved."""
        changed, moved = self._find_changed(base, rows, keys)
        if moved > BYPASS_FRACTION * len(rows):
            self.is_bypassed, self.bypassed_queries = True, 0
            self._rebuild_backoff *= 2
            return
        self._rebuild_backoff = max(1, self._rebuild_backoff // 2)
        base.hide(changed.cpu())
        self.pending = self._combine_pending(changed, base, rows)

    def _find_changed(self, base: Base, rows: RowStorage, keys: Tensor) -> tuple[Tensor, int]:
        """Find the slots of rows that changed since the last update.

        Returns:
            Slots of written rows and of moved rows, and the number of moved rows.
        """
        changed = rows.changed_since(self.version, keys=True)
        written = rows.keys_written_at[changed] > self.version
        moving = changed[~written & (changed < len(base.entry_of))]
        visible = moving[base.is_visible(moving.cpu()).to(moving.device)]
        moved = base.movement.find_moved_slots(visible, keys, self._metric, self.config.tolerance)
        return torch.cat([changed[written], moved]), len(moved)

    def _combine_pending(self, changed: Tensor, base: Base, rows: RowStorage) -> Tensor:
        """Return pending and changed slots, without free slots and norm outliers."""
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

    def _update_sample(self, rows: RowStorage, keys: Tensor, version: int) -> None:
        if self._key_sample is not None:
            self._key_sample.update(rows, keys, version)

    # -- merges ----------------------------------------------------------------------------------------------

    def _build_or_merge_pending(self, rows: RowStorage, keys: Tensor, *, now: bool = False) -> None:
        """Build the base index or merge pending rows, if due or if ``now`` is True."""
        base = self.base
        min_rows = max(2 * self._failed_rows, self.min_rows(keys))
        if self.config.factory == "Flat" or (base is None and len(rows) < min_rows):
            self._drop()
        elif base is None:
            self._rebuild(rows, keys, None)
        else:
            has_garbage = base.visibility.hidden > self.config.garbage * base.entries
            outgrown = base.has_outgrown_lists(len(rows))
            # The threshold is half of the one for a build, so that a few added or deleted rows do not cause repeated
            # builds.
            if 2 * len(rows) < min_rows or (len(rows) < min_rows and (has_garbage or outgrown)):
                self._drop()
            elif self.is_bypassed:
                if now or self.bypassed_queries >= self._rebuild_backoff * (BUILD_COST + base.lists):
                    self._rebuild(rows, keys, None if outgrown else base)
            elif (has_garbage or outgrown) and self.background is None:
                self._rebuild(rows, keys, None if outgrown else base)
            elif len(self.pending) > (
                0 if now else min(self.policy.pending_rows, self.policy.pending_fraction * base.entries)
            ):
                self._merge_pending(base, rows, keys)

    def _drop(self) -> None:
        self.base, self._key_sample, self.is_bypassed = None, None, False
        self.pending = torch.empty(0, dtype=torch.int64, device="cpu")

    def _merge_pending(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Merge finite pending rows into the base index or the norm outliers."""
        with self._costs.count_upkeep():
            is_tuning_due = base.merged_rows + len(self.pending) > base.tuning_fraction * base.entries
            if is_tuning_due:  # tuning chooses the norm outliers again, so all rows are merged
                outliers, base.norm_outliers = base.norm_outliers, base.norm_outliers[:0]
                self.pending = self._combine_pending(outliers.to(self.pending.device), base, rows)
            vectors = to_vectors(keys.index_select(0, self.pending), self._metric)
            norms = torch.linalg.vector_norm(vectors, dim=-1)
            finite = norms < MAX_NORM
            is_merged = finite if is_tuning_due else norms < min(MAX_NORM, base.outlier_norm)
            try:
                if bool(is_merged.all()):
                    base.merge(self.pending.cpu(), vectors)
                else:
                    base.merge(self.pending[is_merged].cpu(), vectors[is_merged])
            except RuntimeError:  # some FAISS indexes do not support appending
                base.recall = None
            else:
                base.norm_outliers = torch.cat([base.norm_outliers, self.pending[~is_merged & finite].cpu()])
                self.pending = self.pending[~finite]
                if is_tuning_due:
                    self._tune_base(base, rows, keys)
        if base.recall is None:
            self._rebuild(rows, keys, None)

    def _tune_base(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Tune the base index to the present rows."""
        live = rows.live_slots()
        source = to_vectors(keys[live[:: max(1, len(live) // QUERY_SOURCE_ROWS)]], self._metric)
        groups = self.queries.make_tuning_groups(source, CHECKING_QUERIES)
        base.tuned_queries, self.queries.since_check = self.queries.usable_count, 0
        selection = select(rows, (), None, None)
        tune_base(base, groups, keys, self._metric, selection, self.config.recall, self.queries.neighbors)

    # -- builds ----------------------------------------------------------------------------------------------

    def _rebuild(self, rows: RowStorage, keys: Tensor, old: Base | None) -> None:
        """Build a base index, here or in the background; reuse the lists of ``old``."""
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

    def _install_background(self, background: BackgroundBuild) -> None:
        """Install the result of a background build.

        The result describes an earlier version of the rows.
        """
        result = background.wait()  # if a signal interrupts it, the build stays in progress
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
