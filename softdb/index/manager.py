"""Find candidates for top-k reads, whatever has happened to the rows.

The index answers with slots, never with scores: what a read returns is computed from the live rows, so a FAISS index
that is approximate or behind can miss a row but not report a wrong one. It is kept from falling behind as a
log-structured store does it: a FAISS *base* holds the rows as they were when it merged them; the rows that have changed
since are hidden in it, and *pending*: every search goes through them exactly (see `upkeep`).

The index changes only when rows have changed, at the first search or refresh after it: between two writes every
search sees the same one. But how much of it is searched follows the queries: their recall is checked now and then, and
how often depends on their number, not on the clock (see `tuning`).
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
from softdb.index.builder import reason_of, rows_to_train
from softdb.index.config import IndexConfig, IndexStats
from softdb.index.faiss_parts import faiss_metric, parts_of
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
    """Make a forked child able to search.

    If its parent has run a parallel region, torch's or FAISS's, the child hangs in its first one (faiss issue 5206):
    the OpenMP runtime waits for threads that fork() did not copy. One thread needs no others. A child of a process
    that has only imported softdb keeps its threads. fork() did not copy a thread that was building either, or one that
    held a lock.
    """
    if is_openmp_used():
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
    for manager in list(_managers):
        manager.forget_threads()


run_in_forked_children(_after_fork)


class IndexManager:
    """Find candidate slots for queries, and follow the rows between searches.

    Args:
        config: The index to keep.
        metric: How rows are scored.
        key_dim: Width of the keys.
        moving: Whether optimisers move the keys.

    Attributes:
        config: The index to keep.
        policy: The thresholds of an index, read when it begins or is reset.

    Raises:
        ArgumentError: FAISS does not know the factory string.
    """

    policy = IndexPolicy()

    def __init__(self, config: IndexConfig, metric: str, key_dim: int, *, moving: bool) -> None:
        self.config = config
        self._metric, self._moving = metric, moving
        self._min_rows = check_factory(config.factory, metric, key_dim)
        self._costs = IndexCosts()
        self.reset()
        self._begin()

    def _begin(self) -> None:
        self._lock: Any = threading.RLock()
        self._layout: int | None = None  # of the rows that the index describes
        note_openmp()  # every store has an index
        _managers.add(self)

    def reset(self) -> None:
        """Forget the base and recent queries."""
        self._upkeep = self._new_upkeep()
        self._is_broken = False  # whether a change of the index broke off, or is under way

    def _new_upkeep(self) -> IndexUpkeep:
        return IndexUpkeep(
            self.config, self._metric, self.policy, self._costs, moving=self._moving, min_rows=self._min_rows
        )

    def forget_threads(self) -> None:
        """Drop a background build and a held lock, whose threads fork did not copy."""
        self._lock = threading.RLock()
        self._upkeep.background = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"], state["_upkeep"]  # a copy builds its own, and sees none of the queries
        state["_costs"] = replace(self._costs)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()
        self._begin()

    @property
    def base(self) -> Base | None:
        """The base index that searches use; None where they are exact."""
        return None if self._is_broken else self._upkeep.usable_base

    @property
    def pending_slots(self) -> Tensor:
        """The slots of rows that differ from the base, as of the last change."""
        return self._upkeep.pending

    @property
    def exact_slots(self) -> Tensor:
        """The slots that are searched exactly: pending rows and norm outliers."""
        return self._upkeep.exact_slots

    @property
    def recent_queries(self) -> Tensor | None:
        """A sample of recent queries, (m, d), or None."""
        return self._upkeep.queries.latest

    @property
    def background(self) -> BackgroundBuild | None:
        """The background build that is under way, or waits to be adopted."""
        return self._upkeep.background

    @property
    def _is_interrupted(self) -> bool:
        """Whether a signal handler has interrupted a change by this thread."""
        return bool(self._lock._is_owned())

    def _base_of(self, rows: RowStorage) -> Base | None:
        """Return the base that searches of ``rows`` may use, which have kept their slots since it was built."""
        return self.base if rows.layout == self._layout else None

    # -- searching -------------------------------------------------------------------------------------------

    def search(
        self,
        query: Tensor,  # (B, d)
        operand: Tensor,  # (B, w): the same, prepared
        keys: Tensor,  # (capacity, d)
        rows: RowStorage,
        spec: ReadSpec,
        k: int,
        *,
        careful: bool = False,
    ) -> Candidates:
        """Find the k best rows of each query; with ``careful``, search wider."""
        task = SearchTask(query.detach(), operand.detach(), keys.detach(), rows, spec, k)
        if self._is_interrupted:
            return Candidates(search_exactly(task), True, 1.0)
        selection = spec.selection
        with self._lock, torch.inference_mode(False):
            upkeep, base = self._upkeep, self._base_of(rows)
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
            neighbours = k * len(rows) / selection.shared_count
            width, recall = plan_search_width(base, len(query), neighbours, careful=careful)
            found = complete_candidates(task, find_candidates(task, base, exact_slots, width))
            return Candidates(found, False, recall)
        finally:
            self._costs.search_seconds += time.perf_counter() - started

    def is_approximate(self, rows: RowStorage, selection: Selection, k: int, queries: int) -> bool:
        """Test whether a search for k rows of each query would be approximate."""
        base = self._base_of(rows)
        return base is not None and approximate_is_cheaper(base, rows, selection, k, queries)

    def list_layout(self, rows: RowStorage, keys: Tensor, size: int) -> ListLayout | None:
        """Return the layout of the slots below ``size``; None without lists."""
        interrupted = self._is_interrupted
        with self._lock, torch.inference_mode(False):
            base = self._base_of(rows)
            return None if base is None or interrupted else base.list_layout(keys, size)

    # -- following the rows ----------------------------------------------------------------------------------

    def is_current(self, rows: RowStorage) -> bool:
        """Test whether searches need no `follow` before."""
        return rows.layout == self._layout and rows.version == self._upkeep.version and not self._is_broken

    def follow(self, rows: RowStorage, keys: Tensor, query: Tensor, k: int) -> None:
        """Follow every change to the rows before a search of ``query``.

        The caller excludes other searches.
        """
        if self._is_interrupted:
            return
        with self._changing(rows) as upkeep:
            upkeep.queries.record(query.detach(), k)
            upkeep.follow(rows, keys)

    def refresh(self, rows: RowStorage, keys: Tensor, *, wait: bool) -> None:
        """Merge every pending row into the base; ``wait`` for a background build.

        Raises:
            IndexBuildError: The last build failed, and no call has raised for it yet.
        """
        if self._is_interrupted:
            return
        with self._changing(rows) as upkeep:
            upkeep.refresh(rows, keys, wait=wait)
        self._upkeep.raise_unreported()

    def build(self, rows: RowStorage, keys: Tensor) -> None:
        """Build the base from the rows as they are.

        Raises:
            IndexBuildError: The build failed.
        """
        if self._is_interrupted:
            return
        with self._changing(rows) as upkeep:
            queries = upkeep.queries.latest
            self.reset()
            self._is_broken = True
            self._upkeep.queries.latest = queries
            self._upkeep.build(rows, keys)
        self._upkeep.raise_unreported()

    @contextmanager
    def _changing(self, rows: RowStorage) -> Iterator[IndexUpkeep]:
        """Change the index, after a reset if rows have a new layout or a change broke off."""
        with self._lock, torch.inference_mode(False):
            if self._is_broken or rows.layout != self._layout:
                self.reset()
                self._layout = rows.layout
            self._is_broken = True
            yield self._upkeep
            self._is_broken = False

    def has_stale_sample(self, keys: Tensor) -> bool:
        """Test whether sampled keys were written to uncounted, as by ``.data``."""
        return not self._is_broken and self._upkeep.has_stale_sample(keys.detach())

    # -- inspection ------------------------------------------------------------------------------------------

    def stats(self, rows: RowStorage, keys: Tensor) -> IndexStats:
        """Describe the index and its costs."""
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
        """Yield claims about an index that searches use, and whether they hold."""
        base = self.base
        if base is None or not self.is_current(rows):
            return
        slots = rows.live_slots().cpu()
        known = slots[slots < len(base.entry_of)]
        visible = known[base.is_visible(known)]
        yield "an entry is that of its slot", torch.equal(base.slots[base.entry_of[visible]], visible)
        reached = torch.cat([visible, self.exact_slots.cpu()]).unique()
        yield "each row is in the base or searched exactly", bool(torch.isin(slots, reached).all())
        yield "as many entries are in FAISS", int(base.owner.ntotal) == base.entries
        yield "the base hides what is no row", base.visibility.hidden == base.entries - len(visible)


def check_factory(factory: str, metric: str, key_dim: int) -> int:
    """Check a factory string, and return the fewest rows to build it with.

    Raises:
        ArgumentError: FAISS does not know it, or it numbers rows itself.
    """
    if factory in ("auto", "Flat"):
        return 1
    expected = f"index: expected 'auto', 'Flat' or a FAISS factory string for width {key_dim}, got {factory!r}"
    try:
        index = faiss.index_factory(key_dim, factory, faiss_metric(metric))
    except RuntimeError as error:
        raise ArgumentError(f"{expected}, which FAISS refuses: {reason_of(error)}") from error
    if any(isinstance(part, faiss.IndexIDMap) for part in parts_of(index)):
        raise ArgumentError(f"{expected}; leave out IDMap, since softdb numbers the rows itself")
    return rows_to_train(index)
