"""Find candidates for top-k reads.

The index returns slots, not scores: a read computes its scores from the live rows. An approximate or outdated FAISS
index can therefore miss a row, but cannot cause a wrong score. The index is organized as a log-structured store. The
*base index* is a FAISS index that contains each row as it was when it was merged. Rows that have changed since are
hidden in the base index. They are *pending*: every search compares them exactly (see `upkeep`).

The index is updated at the first search or refresh after a write, so all searches between two writes use the same
index. Only the search width may change between them: the recall on recent queries is checked from time to time, at
intervals that depend on the number of queries, not on the clock (see `tuning`).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import faiss

from softdb.errors import ArgumentError
from softdb.filters import Selection
from softdb.index.background import BackgroundBuild
from softdb.index.base import Base
from softdb.index.builder import count_training_rows, format_faiss_error
from softdb.index.config import IndexConfig, IndexStats
from softdb.index.faiss_parts import iterate_parts, to_faiss_metric
from softdb.index.list_layout import ListLayout
from softdb.index.planner import approximate_is_cheaper, plan_search_width
from softdb.index.policy import IndexPolicy
from softdb.index.search import Candidates, SearchTask, complete_candidates, find_candidates, search_exactly
from softdb.index.tuning import check_recent_queries
from softdb.index.upkeep import IndexCosts, IndexUpkeep
from softdb.kernels.spec import ReadSpec
from softdb.processes import is_openmp_used, note_openmp, run_in_forked_children
from softdb.table.storage import RowStorage

__all__ = ["Candidates", "IndexManager"]

_managers: weakref.WeakSet[IndexManager] = weakref.WeakSet()


def _after_fork() -> None:
    """Enable searches in a forked child.

    If the parent has run an OpenMP region, in torch or FAISS, the first region in the child hangs (faiss issue 5206):
    the runtime waits for threads that fork() did not copy. The child therefore uses one thread, unless the parent has
    only imported softdb. fork() copied neither build threads nor threads that hold locks, so background builds are
    dropped, and locks are replaced.
    """
    if is_openmp_used():
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
    for manager in list(_managers):
        manager.forget_threads()


run_in_forked_children(_after_fork)


class IndexManager:
    """Index of a store, which finds candidate slots and tracks changes of rows.

    Args:
        config: Configuration of the index.
        metric: Metric of the scores.
        key_dim: Width of the keys.
        moving: Whether optimizers may move the keys.

    Attributes:
        config: Configuration of the index.
        policy: Thresholds of the index, read when it is created or reset.

    Raises:
        ArgumentError: FAISS does not accept the factory string.
    """

    policy = IndexPolicy()

    def __init__(self, config: IndexConfig, metric: str, key_dim: int, *, moving: bool) -> None:
        self.config = config
        self._metric, self._moving = metric, moving
        self._min_rows = check_factory(config.factory, metric, key_dim)
        self._costs = IndexCosts()
        self.reset()
        self._initialize()

    def _initialize(self) -> None:
        self._lock: Any = threading.RLock()
        self._layout: int | None = None  # layout of the rows that the index describes
        note_openmp()  # every store has an index, and searches use OpenMP
        _managers.add(self)

    def reset(self) -> None:
        """Drop the base index and recent queries."""
        self._upkeep = self._new_upkeep()
        self._is_broken = False  # whether an update of the index failed or is in progress

    def _new_upkeep(self) -> IndexUpkeep:
        return IndexUpkeep(
            self.config, self._metric, self.policy, self._costs, moving=self._moving, min_rows=self._min_rows
        )

    def forget_threads(self) -> None:
        """Drop the background build and replace the lock: fork() copies no other thread."""
        self._lock = threading.RLock()
        self._upkeep.background = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"], state["_upkeep"]  # a copy builds its own index, and records its own queries
        state["_costs"] = replace(self._costs)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()
        self._initialize()

    @property
    def base(self) -> Base | None:
        """Base index that searches use; None if they are exact."""
        return None if self._is_broken else self._upkeep.usable_base

    @property
    def pending_slots(self) -> Tensor:
        """Slots of the pending rows, as of the last update."""
        return self._upkeep.pending

    @property
    def exact_slots(self) -> Tensor:
        """Slots that are searched exactly: pending rows and norm outliers."""
        return self._upkeep.exact_slots

    @property
    def recent_queries(self) -> Tensor | None:
        """Sample of recent queries, (m, d), or None."""
        return self._upkeep.queries.latest

    @property
    def background(self) -> BackgroundBuild | None:
        """Background build that is in progress or not yet installed, or None."""
        return self._upkeep.background

    @property
    def _is_interrupted(self) -> bool:
        """Whether a signal handler has interrupted an update by this thread."""
        return bool(self._lock._is_owned())

    def _base_of(self, rows: RowStorage) -> Base | None:
        """Return the base index if ``rows`` still have the layout it was built for."""
        return self.base if rows.layout == self._layout else None

    # -- searching -------------------------------------------------------------------------------------------

    def search(
        self,
        query: Tensor,  # (B, d)
        operand: Tensor,  # (B, w): prepared queries
        keys: Tensor,  # (capacity, d)
        rows: RowStorage,
        spec: ReadSpec,
        k: int,
        *,
        careful: bool = False,
    ) -> Candidates:
        """Find candidates of each query; with ``careful``, use a larger search width."""
        task = SearchTask(query.detach(), operand.detach(), keys.detach(), rows, spec, k)
        if self._is_interrupted:
            return Candidates(search_exactly(task), True, 1.0)
        selection = spec.selection
        with self._lock, torch.inference_mode(False):
            upkeep, base = self._upkeep, self._base_of(rows)
            if upkeep.has_to_watch(rows, keys):
                upkeep.queries.record_once(task.query, k)
            if upkeep.is_bypassed:
                upkeep.bypassed_queries += len(query)
            if base is not None and approximate_is_cheaper(base, rows, selection, k, len(query)):
                upkeep.queries.since_check += len(query)
                check_recent_queries(
                    base, upkeep.queries, upkeep.exact_slots, task.keys, rows, self._metric, self.config.recall
                )
            exact_slots = upkeep.exact_slots
        started = time.perf_counter()
        try:
            if base is None or not approximate_is_cheaper(base, rows, selection, k, len(query)):
                return Candidates(search_exactly(task), True, 1.0)
            neighbors = k * len(rows) / selection.shared_count
            width, recall = plan_search_width(base, len(query), neighbors, careful=careful)
            found = complete_candidates(task, find_candidates(task, base, exact_slots, width))
            return Candidates(found, False, recall)
        finally:
            self._costs.search_seconds += time.perf_counter() - started

    def is_approximate(self, rows: RowStorage, selection: Selection, k: int, queries: int) -> bool:
        """Return whether a search for k rows of each query is approximate."""
        base = self._base_of(rows)
        return base is not None and approximate_is_cheaper(base, rows, selection, k, queries)

    def list_layout(self, rows: RowStorage, keys: Tensor, size: int) -> ListLayout | None:
        """Return the list layout of the slots below ``size``; None without lists."""
        is_interrupted = self._is_interrupted
        with self._lock, torch.inference_mode(False):
            base = self._base_of(rows)
            return None if base is None or is_interrupted else base.list_layout(keys, size)

    # -- updates ---------------------------------------------------------------------------------------------

    def is_current(self, rows: RowStorage) -> bool:
        """Return whether the index is up to date with ``rows``."""
        return rows.layout == self._layout and rows.version == self._upkeep.version and not self._is_broken

    def update(self, rows: RowStorage, keys: Tensor, query: Tensor, k: int) -> None:
        """Update the index with every change to the rows, before a search.

        The caller must exclude other searches.
        """
        if self._is_interrupted:
            return
        with self._updating(rows) as upkeep:
            if upkeep.has_to_watch(rows, keys):
                upkeep.queries.record(query.detach(), k)
            upkeep.update(rows, keys)

    def refresh(self, rows: RowStorage, keys: Tensor, *, wait: bool) -> None:
        """Merge all pending rows; with ``wait``, wait for a background build.

        Raises:
            IndexBuildError: The last build failed, and no earlier call raised for it.
        """
        if self._is_interrupted:
            return
        with self._updating(rows) as upkeep:
            upkeep.refresh(rows, keys, wait=wait)
        self._upkeep.raise_unreported()

    def build(self, rows: RowStorage, keys: Tensor) -> None:
        """Build the base index from the present rows.

        Raises:
            IndexBuildError: The build failed.
        """
        if self._is_interrupted:
            return
        with self._updating(rows) as upkeep:
            queries = upkeep.queries.latest
            self.reset()
            self._is_broken = True
            self._upkeep.queries.latest = queries
            self._upkeep.build(rows, keys)
        self._upkeep.raise_unreported()

    @contextmanager
    def _updating(self, rows: RowStorage) -> Iterator[IndexUpkeep]:
        """Lock the index for an update.

        The index is reset first if rows have a new layout or an earlier update failed.
        """
        with self._lock, torch.inference_mode(False):
            if self._is_broken or rows.layout != self._layout:
                self.reset()
                self._layout = rows.layout
            self._is_broken = True
            yield self._upkeep
            self._is_broken = False

    def has_stale_sample(self, keys: Tensor) -> bool:
        """Return whether sampled keys have been changed by unknown writes.

        torch's version counters do not count unknown writes, such as writes through ``.data``.
        """
        return not self._is_broken and self._upkeep.has_stale_sample(keys.detach())

    # -- inspection ------------------------------------------------------------------------------------------

    def stats(self, rows: RowStorage, keys: Tensor) -> IndexStats:
        """Return the statistics of the index."""
        upkeep = self._upkeep if rows.layout == self._layout else self._new_upkeep()
        base = None if self._is_broken else upkeep.base
        return IndexStats(
            rows=len(rows),
            pending=0 if base is None else upkeep.count_pending(rows, keys),
            factory="Flat" if base is None else base.factory,
            nprobe=None if base is None else base.probes,
            recall=1.0 if base is None else base.recall,
            builds=self._costs.builds,
            search_seconds=self._costs.search_seconds,
            upkeep_seconds=self._costs.upkeep_seconds,
            rebuild_seconds=self._costs.rebuild_seconds,
            error=upkeep.error,
        )

    def invariants(self, rows: RowStorage) -> Iterator[tuple[str, bool]]:
        """Yield descriptions of invariants, and whether they hold."""
        base = self.base
        if base is None or not self.is_current(rows):
            return
        slots = rows.live_slots().cpu()
        indexed = slots[slots < len(base.entry_of)]
        visible = indexed[base.is_visible(indexed)]
        yield "a visible entry belongs to its slot", torch.equal(base.slots[base.entry_of[visible]], visible)
        searched = torch.cat([visible, self.exact_slots.cpu()]).unique()
        yield "each row is visible in the base index or searched exactly", bool(torch.isin(slots, searched).all())
        yield "FAISS has the same number of entries", int(base.owner.ntotal) == base.entries
        yield "all other entries of the base index are hidden", base.visibility.hidden == base.entries - len(visible)


def check_factory(factory: str, metric: str, key_dim: int) -> int:
    """Check a factory string, and return the minimum number of rows for a build.

    Raises:
        ArgumentError: FAISS does not accept the string, or its index assigns ids itself.
    """
    if factory in ("auto", "Flat"):
        return 1
    expected = f"index: expected 'auto', 'Flat' or a FAISS factory string for width {key_dim}, got {factory!r}"
    try:
        index = faiss.index_factory(key_dim, factory, to_faiss_metric(metric))
    except RuntimeError as error:
        raise ArgumentError(f"{expected}, which FAISS does not accept: {format_faiss_error(error)}") from error
    if any(isinstance(part, faiss.IndexIDMap) for part in iterate_parts(index)):
        raise ArgumentError(f"{expected}; leave out IDMap, since softdb assigns ids itself")
    return count_training_rows(index)
