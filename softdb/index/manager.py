"""Candidates for a top-k read: which rows are worth scoring.

The index answers with slots, never with scores: what a read returns is computed from the live rows, so a FAISS index
that is approximate or behind can miss a row but not report a wrong one. It is kept from falling behind as a
log-structured store does it: a FAISS *base* holds the rows as they were when it took them in; the rows that have
changed since are hidden in it, and *pending*: every search goes through them exactly. Enough pending rows are taken
into the base; when too many of its entries are garbage, it is built anew.

A row written by `add`, `put`, `update` or `touch` is pending. One that an optimiser may have moved is pending once its
key is further from where the base saw it than a tolerance. So the base keeps a copy of the keys as it saw them, and a
row-sparse step costs a look at its rows, any other step a look at all.

Training makes some keys much longer than others. By dot product these are among the best of queries all over the
place, which no list of neighbours can tell: the longest few, the *crown*, are searched exactly, too.

The index changes only when rows have changed, at the first search or refresh after it: between two writes every
search sees the same one. But how much of it is searched follows the queries that are asked: their recall is checked now
and then, and how often depends on their number, not on the clock.

This is the only module that imports faiss.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import faiss

from softdb.errors import ArgumentError, IndexBuildError
from softdb.filters import Selection, select
from softdb.index.base import Base
from softdb.index.builder import Background, Built, Plan, reason_of, rows_to_train
from softdb.index.config import IndexConfig, IndexStats
from softdb.index.faiss_parts import array_of, faiss_metric, parts_of, prepared_keys
from softdb.index.list_layout import Outline
from softdb.index.planner import cost_of, pays
from softdb.index.policy import IndexPolicy
from softdb.index.tuning import TELLING_QUERIES, best_candidates, truth_of, tuning_queries
from softdb.kernels.cpu.topk import exact_top_k
from softdb.kernels.gather import scores_at
from softdb.kernels.spec import ReadSpec
from softdb.processes import is_openmp_used, note_openmp, run_in_forked_children
from softdb.table.storage import RowStorage

# IVF lists of an "auto" index, for each square root of a row: FAISS advises 4 to 16.
LISTS = 4


# Where a step has moved this share of the rows, exact searches are cheaper than keeping up, until steps get smaller.
MASS = 1 / 4


# What a build costs, beside finding lists: as many products with a query for each row.
BUILD_PRODUCTS = 1024


# Keys this long overflow when they are compared, and FAISS aborts the process: they are left out.
LONGEST = 1e18


# Queries, and neighbours of each at the least and the most, that the probes are tuned on; how many of a read's own tell
# a recall of theirs; and how many when it is checked again.
TUNING_QUERIES, NEIGHBOURS, MOST_NEIGHBOURS = 256, 32, 256


CHECKING_QUERIES = 64


# A measured recall says no more than that so few are missed.
FEWEST_MISSES = 1e-4


_indexes: weakref.WeakSet[IndexManager] = weakref.WeakSet()


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
    for index in list(_indexes):
        index.forget_threads()


run_in_forked_children(_after_fork)


class Found(NamedTuple):
    """What a search found.

    Attributes:
        slots: The k best rows of each query, as far as the index finds them, (B, k); -1 where fewer may be seen.
        exact: Whether they are the best for certain.
        recall: The share of the best that is expected among them.
    """

    slots: Tensor
    exact: bool
    recall: float


class IndexManager:
    """Finds candidate slots for queries, whatever happened to the rows since the last search.

    Args:
        config: What index to keep.
        metric: How rows are scored.
        key_dim: Width of the keys.
        moving: Whether optimisers move the keys.

    Raises:
        ArgumentError: FAISS does not know the factory string.
    """

    policy = IndexPolicy()

    def __init__(self, config: IndexConfig, metric: str, key_dim: int, *, moving: bool) -> None:
        self.config = config
        self._metric, self._moving = metric, moving
        self._rows_to_train = 1
        if config.factory not in ("auto", "Flat"):
            wanted = f"index: expected 'auto', 'Flat' or a FAISS factory string for width {key_dim}, got"
            try:
                index = faiss.index_factory(key_dim, config.factory, faiss_metric(metric))
            except RuntimeError as error:
                raise ArgumentError(f"{wanted} {config.factory!r}, which FAISS refuses: {reason_of(error)}") from error
            if any(isinstance(part, faiss.IndexIDMap) for part in parts_of(index)):
                raise ArgumentError(
                    f"{wanted} {config.factory!r}; leave out IDMap, since softdb numbers the rows itself"
                )
            self._rows_to_train = rows_to_train(index)
        self._builds = self._layout = 0
        self._search_seconds = self._upkeep_seconds = self._rebuild_seconds = 0.0
        self.reset()
        self._begin()

    def _begin(self) -> None:
        self._lock: Any = threading.RLock()
        self._aside: Background | None = None
        note_openmp()  # every store has an index
        _indexes.add(self)

    def reset(self) -> None:
        """Forget the base: rows were loaded or converted."""
        self._base: Base | None = None
        self._aside = None
        self._pending: Tensor = torch.empty(0, dtype=torch.int64, device="cpu")
        self._beside = self._pending  # with the crown
        self._version = -1
        self._queries: Tensor | None = None  # the latest
        self._asked = 0  # how many have been since the recall was checked on them
        self._neighbours = NEIGHBOURS  # as many as a search has wanted, within limits
        self._failed_at = 0  # how many rows there were when a build failed
        self._error: str | None = None
        self._untold = False  # whether `refresh` is to raise it
        self._unsure = False  # while it changes: for good, if that breaks off
        self._noted: Tensor | None = None  # queries that a search need not note again
        # While the base is asleep searches are exact. It is built anew once they have cost as much as building, for
        # then not more than twice the cheapest was spent; where that was in vain, the next time is put off for longer.
        self._asleep, self._searched, self._patience = False, 0, 1

    def forget_threads(self) -> None:
        """Drop a build under way: this process does not have its thread."""
        self._lock = threading.RLock()
        self._aside = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"], state["_base"], state["_aside"]  # a copy builds its own
        state["_queries"] = state["_noted"] = None  # nobody else's business
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()
        self._begin()

    @property
    def _is_interrupted(self) -> bool:
        """Whether a signal's handler asks, in the middle of what its thread does here: it is to leave that alone."""
        return bool(self._lock._is_owned())

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
    ) -> Found:
        """The k best rows of each query, as far as the index finds them; with ``careful``, more of them."""
        query, operand, keys = query.detach(), operand.detach(), keys.detach()
        selection = spec.selection
        if self._is_interrupted:
            return Found(exact_top_k(operand, keys, spec, k)[1], True, 1.0)
        with self._lock, torch.inference_mode(False):
            if self._noted is None or query.data_ptr() != self._noted.data_ptr():
                self._note_queries(query, k)
            self._noted = None
            base = self._awake
            if self._asleep:
                self._searched += len(query)
            if base is not None and pays(base, rows, selection, k, len(query)):
                self._asked += len(query)
                self._follow_queries(base, rows, keys)
            beside = self._beside
        started = time.perf_counter()
        try:
            if base is None or not pays(base, rows, selection, k, len(query)):
                return Found(exact_top_k(operand, keys, spec, k)[1], True, 1.0)
            effort, recall = self._effort(base, len(query), k * len(rows) / selection.shared_count, careful)
            found = self._find(base, beside, query, operand, keys, rows, spec, k, effort)
            missing = found < 0
            if bool(missing.any()):
                short = ((~missing).sum(-1) < k).nonzero().squeeze(-1)
                rest = replace(spec, selection=selection.take(short), key_norm=None, narrow=False, noise=None)
                found[short] = exact_top_k(operand[short], keys, rest, k)[1]
            return Found(found, False, recall)
        finally:
            self._search_seconds += time.perf_counter() - started

    def _effort(self, base: Base, queries: int, neighbours: float, careful: bool) -> tuple[int | None, float]:
        """How much to search for so many neighbours, and the recall that is to be expected.

        Of some of the rows, those that a filter leaves, the k best lie as far apart as more of all rows do.
        """
        recall = min(base.recall or 0.0, 1 - FEWEST_MISSES)
        now, limit = base.effort
        wanted = now * math.sqrt(max(1.0, neighbours / max(1, base.neighbours)))
        if base.probes is None:
            wanted = max(wanted, neighbours)  # a search in a graph is at least as wide, whatever efSearch says
        effort = min(limit, math.ceil(wanted))
        policy = self.policy
        if careful and policy.careful * wanted / max(1, now) * cost_of(base, queries) < policy.careful_share:
            usual, effort = effort, min(limit, math.ceil(policy.careful * wanted))
            if limit and base.is_exact_at_full_width:
                recall = 1 - (1 - recall) * usual / effort
        return (None if effort == now else effort), recall

    def _find(
        self,
        base: Base,
        beside: Tensor,
        query: Tensor,
        operand: Tensor,
        keys: Tensor,
        rows: RowStorage,
        spec: ReadSpec,
        k: int,
        effort: int | None,
    ) -> Tensor:  # (B, k)
        """The best rows of the base and of those that are searched beside it."""
        found = self._search_base(base, query, rows, spec, k, effort)  # (B, c)
        if len(beside):
            visible = replace(spec, selection=spec.selection.among(beside), key_norm=None, narrow=False, noise=None)
            found = torch.cat([found, exact_top_k(operand, keys, visible, k)[1]], dim=-1)
        return best_candidates(found, operand, keys, spec, k) if found.shape[-1] > k else found

    def approximates(self, rows: RowStorage, selection: Selection, k: int, queries: int) -> bool:
        """Whether a search for k rows of each query would not be exact, which is when that is cheaper."""
        base = self._awake
        return base is not None and pays(base, rows, selection, k, queries)

    @property
    def _awake(self) -> Base | None:
        """The base, where searches may use it."""
        return None if self._asleep or self._unsure else self._base

    def _search_base(
        self, base: Base, query: Tensor, rows: RowStorage, spec: ReadSpec, k: int, effort: int | None
    ) -> Tensor:
        selection = spec.selection
        wanted = k
        if selection.excluded is not None:
            wanted += selection.excluded.shape[-1]
        if selection.rule is not None:
            wanted *= 4
        filtered = None if selection.shared is rows.live() else selection.shared
        allowed = None if filtered is None else filtered.cpu()
        slots = base.search(array_of(prepared_keys(query, self._metric)), wanted, allowed, effort=effort).to(
            query.device
        )
        if selection.shared is None and selection.is_shared:
            return slots
        return slots.masked_fill_(~selection.allows(slots), -1)

    def outline(self, keys: Tensor, size: int) -> Outline | None:
        """The slots below ``size`` in the order of the base's lists, and where those lie; None where there are none."""
        interrupted = self._is_interrupted
        with self._lock, torch.inference_mode(False):
            base = self._awake
            return None if base is None or interrupted else base.outline(keys, size)

    # -- following the rows ----------------------------------------------------------------------------------

    def is_current(self, rows: RowStorage) -> bool:
        """Whether searches need no `follow` before."""
        return rows.version == self._version and rows.layout == self._layout and not self._unsure

    def follow(self, rows: RowStorage, keys: Tensor, query: Tensor, k: int) -> None:
        """Take note of every change to the rows, for a search of ``query``, while nobody else searches."""
        if self._is_interrupted:
            return
        with self._changing(rows):
            self._note_queries(query.detach(), k)
            self._noted = query.detach()
            self._follow(rows, keys)

    @contextmanager
    def _changing(self, rows: RowStorage) -> Iterator[None]:
        """Change the index; where that breaks off anywhere, there is none any more."""
        with self._lock, torch.inference_mode(False):
            if self._unsure or rows.layout != self._layout:
                self.reset()
                self._layout = rows.layout
            self._unsure = True
            yield
            self._unsure = False

    def _follow(self, rows: RowStorage, keys: Tensor) -> None:
        """Take note of every change since the last call."""
        version, before = rows.version, self._version
        if version == before:
            return
        if self._aside is not None and self._aside.is_done:
            self._adopt(self._aside)
        if self._base is not None:
            with self._upkeep():
                self._base.widen(rows.capacity)
                if not self._asleep:
                    self._note_changes(self._base, rows, keys)
        self._version = version  # a signal's handler may have written meanwhile
        self._settle(rows, keys)
        self._list_beside()
        if self._base is not None:
            self._base.follow_sample(rows, keys, before)

    def has_stale_sample(self, keys: Tensor) -> bool:
        """Whether keys were written to in a way that nothing noticed, as by ``.data``, judged by a sample of rows."""
        base = self._awake
        return base is not None and base.has_stale_sample(keys.detach(), self._metric, self.config.tolerance)

    def _told(self) -> int:
        """How many queries tell a recall."""
        return 0 if self._queries is None or len(self._queries) < TELLING_QUERIES else len(self._queries)

    def _note_queries(self, query: Tensor, k: int) -> None:
        if len(query) == 0:
            return
        while self._neighbours < min(k, MOST_NEIGHBOURS):
            self._neighbours *= 2
        latest = query[:: max(1, len(query) // TUNING_QUERIES)][:TUNING_QUERIES]
        if self._queries is not None and len(latest) < TUNING_QUERIES and self._queries.dtype == latest.dtype:
            latest = torch.cat([self._queries[len(latest) - TUNING_QUERIES :], latest])
        self._queries = latest.clone()

    def _follow_queries(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Check the recall where queries may have become others, or more neighbours are asked for.

        So often that it costs little beside the searches: by the number of queries, not by the clock. Nothing changes
        but the effort: searches under way may use the base.
        """
        if self._queries is None or len(self._queries) < TELLING_QUERIES:
            return
        enough = min(len(self._queries), CHECKING_QUERIES)
        first = enough >= max(1, 2 * base.told) or base.neighbours < self._neighbours
        if not first and self._asked < base.next_check:
            return
        queries = self._queries[-(TUNING_QUERIES if first else CHECKING_QUERIES) :]
        before, _ = base.effort
        now, recall = self._measured_effort(base, queries, rows, keys, beyond_chance=first)
        base.exert(now)
        base.recall, base.neighbours, base.told = recall, self._neighbours, len(queries)
        policy = self.policy
        least = CHECKING_QUERIES + policy.first_query_cost
        affordable = least / (policy.drift_share * policy.visit_cost * base.looked_at)
        longer = 2 * base.next_check if now == before else policy.check_after
        base.next_check, self._asked = max(policy.check_after, min(longer, math.ceil(affordable))), 0

    def _measured_effort(
        self, base: Base, queries: Tensor, rows: RowStorage, keys: Tensor, *, beyond_chance: bool
    ) -> tuple[int, float]:
        """The least effort, about, with which queries find as many of their best rows as wanted, and how many."""
        wanted, k = self.config.recall, min(self._neighbours, len(rows))
        selection = select(rows, (), None, None)
        spec, operand, _, worst = truth_of(queries, keys, self._metric, selection, k)

        def measure(effort: int) -> tuple[float, bool]:
            found = self._find(base, self._beside, queries, operand, keys, rows, spec, k, effort or None)
            shares = ((scores_at(operand, keys, found, spec) >= worst) & (found >= 0)).sum(-1) / k
            recall = float(shares.mean())
            chance = float(shares.std()) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
            return recall, recall - chance >= wanted if beyond_chance else recall >= wanted - self.policy.near_enough

        now, limit = base.effort
        recall, enough = measure(now)
        few = now
        while not enough and now < limit:
            few, now = now, min(limit, 2 * now)
            recall, enough = measure(now)
        if few == now and recall > wanted + self.policy.near_enough:
            few = now // 2
        while now - few > max(1, now // 8):
            middle = (few + now) // 2
            found, enough = measure(middle)
            if enough and found >= wanted:
                now, recall = middle, found
            else:
                few = middle
        return now, recall

    def _list_beside(self) -> None:
        """What searches go through beside the base."""
        self._beside = self._pending
        if self._base is not None and len(self._base.crown):
            crown = self._base.crown.to(self._pending.device)
            self._beside = torch.cat([self._pending, crown]).sort().values

    def _note_changes(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        outdated, moved = self._outdated(base, rows, keys)
        if moved > MASS * len(rows):
            self._asleep, self._searched = True, 0
            self._patience *= 2
            return
        self._patience = max(1, self._patience // 2)
        base.hide(outdated.cpu())
        self._pending = self._pending_with(outdated, base, rows)

    def _outdated(self, base: Base, rows: RowStorage, keys: Tensor) -> tuple[Tensor, int]:
        """The slots that the base shows as they no longer are, and how many of them have been moved, not written."""
        changed = rows.changed_since(self._version, keys=True)
        written = rows.keys_written_at[changed] > self._version
        moving = changed[~written & (changed < len(base.entry_of))]
        moved = base.moved(moving[base.sees(moving.cpu()).to(moving.device)], keys, self._metric, self.config.tolerance)
        return torch.cat([changed[written], moved]), len(moved)

    def _pending_with(self, changed: Tensor, base: Base, rows: RowStorage) -> Tensor:
        """The pending slots once ``changed`` ones are, too; a slot without a row is not, nor one of the crown."""
        pending: Tensor = torch.cat([self._pending.to(changed.device), changed]).unique()
        pending = pending[rows.ids[pending] >= 0]
        return pending[~torch.isin(pending, base.crown.to(pending.device))] if len(base.crown) else pending

    def _settle(self, rows: RowStorage, keys: Tensor, *, now: bool = False) -> None:
        """Build, or take pending rows in, if it is due; ``now`` if there is any reason to."""
        base = self._base
        enough = max(2 * self._failed_at, self._fewest_rows)
        if self.config.factory == "Flat" or (base is None and len(rows) < enough):
            self._drop()
        elif base is None:
            self._renew(rows, keys, None)
        else:
            garbage = base.visible.hidden > self.config.garbage * base.entries
            outworn = base.is_outworn(len(rows))
            # Well below the number that it was built for, so that a row more or less does not build it again and again.
            if 2 * len(rows) < enough or (len(rows) < enough and (garbage or outworn)):
                self._drop()
            elif self._asleep:
                if now or self._searched >= self._patience * (BUILD_PRODUCTS + base.lists):
                    self._renew(rows, keys, None if outworn else base)
            elif (garbage or outworn) and self._aside is None:
                self._renew(rows, keys, None if outworn else base)
            elif len(self._pending) > (
                0 if now else min(self.policy.pending_rows, self.policy.pending_share * base.entries)
            ):
                self._take(base, rows, keys)

    def _drop(self) -> None:
        self._base, self._asleep = None, False
        self._pending = torch.empty(0, dtype=torch.int64, device="cpu")

    def _take(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Let the base take the pending rows in, or the crown; not those that training has led to infinity."""
        with self._upkeep():
            check = base.taken + len(self._pending) > base.check_after * base.entries
            if check:  # whether a row belongs to the crown is to be found out, so none does
                crown, base.crown = base.crown, base.crown[:0]
                self._pending = self._pending_with(crown.to(self._pending.device), base, rows)
            vectors = prepared_keys(keys.index_select(0, self._pending), self._metric)
            norms = torch.linalg.vector_norm(vectors, dim=-1)
            sane = norms < LONGEST
            inside = sane if check else norms < min(LONGEST, base.crown_norm)
            try:
                if bool(inside.all()):
                    base.take(self._pending.cpu(), vectors)
                else:
                    base.take(self._pending[inside].cpu(), vectors[inside])
            except RuntimeError:  # some indexes can only be built at once
                base.recall = None
            else:
                base.crown = torch.cat([base.crown, self._pending[~inside & sane].cpu()])
                self._pending = self._pending[~sane]
                if check:
                    self._check_recall(base, rows, keys)
        if base.recall is None:
            self._renew(rows, keys, None)

    def _check_recall(self, base: Base, rows: RowStorage, keys: Tensor) -> None:
        """Tune the probes to the rows as they are now."""
        live = rows.live_slots()
        sample = prepared_keys(keys[live[:: max(1, len(live) // 2**12)]], self._metric)
        queries = tuning_queries(self._queries, sample, CHECKING_QUERIES)
        base.told, self._asked = self._told(), 0
        everything = select(rows, (), None, None)
        base.tune(queries, keys, self._metric, everything, self.config.recall, self._neighbours)

    def refresh(self, rows: RowStorage, keys: Tensor, *, wait: bool) -> None:
        """Take every pending row into the base; with ``wait``, let a build in the background come to its end."""
        if self._is_interrupted:
            return
        with self._changing(rows):
            self._follow(rows, keys)
            self._settle(rows, keys, now=True)
            if self._aside is not None and (wait or self._aside.is_done):
                self._adopt(self._aside)
                self._follow(rows, keys)
                self._settle(rows, keys, now=True)
            self._list_beside()
        self._tell_error()

    def _tell_error(self) -> None:
        """Raise for the last build, if it failed, once."""
        untold, self._untold = self._untold, False
        if untold:
            raise IndexBuildError(
                "the index could not be built, and searches are exact until there are twice as many rows: "
                f"{self._error}"
            )

    def build(self, rows: RowStorage, keys: Tensor) -> None:
        """Build the base anew from the rows as they are."""
        if self._is_interrupted:
            return
        with self._changing(rows):
            queries = self._queries
            self.reset()
            self._unsure, self._version, self._queries = True, rows.version, queries
            if self.config.factory != "Flat" and len(rows) >= self._fewest_rows:
                self._install(self._plan(rows, keys, None).carry_out())
            self._list_beside()
            if self._base is not None:
                self._base.follow_sample(rows, keys, self._version)
        self._tell_error()

    # -- building --------------------------------------------------------------------------------------------

    @property
    def _fewest_rows(self) -> int:
        """How many rows there have to be before a base is built."""
        return self.policy.exact_rows if self.config.factory == "auto" else self._rows_to_train

    def _renew(self, rows: RowStorage, keys: Tensor, old: Base | None) -> None:
        """Build a base, with the trained lists of an ``old`` one if there is any, now or aside."""
        if not self.config.background:
            self._install(self._plan(rows, keys, old).carry_out())
        elif self._aside is None:
            self._aside = Background(self._plan(rows, keys, old))

    def _plan(self, rows: RowStorage, keys: Tensor, old: Base | None) -> Plan:
        slots = rows.live_slots()
        vectors = prepared_keys(keys if len(slots) == len(keys) else keys.index_select(0, slots), self._metric)
        left_out = slots[:0]
        finite = torch.linalg.vector_norm(vectors, dim=-1) < LONGEST
        if not bool(finite.all()):
            slots, left_out, vectors = slots[finite], slots[~finite], vectors[finite]
        copied = self._moving or self.config.background
        if copied and vectors.data_ptr() == keys.data_ptr():
            vectors = vectors.clone()
        here = slots.cpu()
        factory = self.config.factory
        if factory == "auto":
            factory = f"IVF{2 ** round(np.log2(LISTS * np.sqrt(max(1, len(slots)))))},Flat"
        empty = lists = None
        if old is not None and old.lists:
            factory, empty = old.factory, faiss.clone_index(old.owner)
            empty.reset()
            lists = np.full(len(here), -1, dtype=np.int64)
            known = old.sees(here) & (not self._asleep)
            lists[known.numpy()] = old.lists_of(old.entry_of[here[known]])
        return Plan(
            rows.version,
            here,
            vectors,
            None if copied else keys,
            left_out,
            rows.capacity,
            factory,
            None if empty is None else old,
            empty,
            lists,
            tuning_queries(self._queries, vectors, TUNING_QUERIES),
            self._metric,
            self.config.recall,
            self._neighbours,
            self._told(),
            self.policy,
        )

    def _adopt(self, aside: Background) -> None:
        """Change to what was built aside, from rows as they were then."""
        built = aside.result()  # may be interrupted: then it is still under way
        self._aside = None
        if built is not None:
            self._install(built)
            self._version = built.version

    def _install(self, built: Built) -> None:
        self._rebuild_seconds += built.seconds
        self._base, self._error, self._asleep, self._pending = built.base, built.error, False, built.left_out
        if built.base is None:
            self._failed_at, self._untold = built.rows, True
        else:
            self._builds, self._untold = self._builds + 1, False

    @contextmanager
    def _upkeep(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._upkeep_seconds += time.perf_counter() - started

    def stats(self, rows: RowStorage, keys: Tensor) -> IndexStats:
        """What the index is and what it has cost."""
        base = None if self._unsure else self._base
        pending = 0
        if base is not None and self._asleep:
            pending = len(rows)
        elif base is not None:
            pending = len(self._pending_with(self._outdated(base, rows, keys)[0], base, rows))
        return IndexStats(
            rows=len(rows),
            pending=pending,
            factory="Flat" if base is None else base.factory,
            nprobe=None if base is None else base.probes,
            recall=1.0 if base is None else base.recall,
            builds=self._builds,
            search_seconds=self._search_seconds,
            upkeep_seconds=self._upkeep_seconds,
            rebuild_seconds=self._rebuild_seconds,
            error=self._error,
        )

    def invariants(self, rows: RowStorage) -> Iterator[tuple[str, bool]]:
        """What has to be true of an index that searches use, and whether it is."""
        base = self._awake
        if base is None or self._version != rows.version:
            return
        slots = rows.live_slots().cpu()
        known = slots[slots < len(base.entry_of)]
        seen = known[base.sees(known)]
        yield "an entry is that of its slot", torch.equal(base.slots[base.entry_of[seen]], seen)
        reached = torch.cat([seen, self._beside.cpu()]).unique()
        yield "each row is in the base or beside it", bool(torch.isin(slots, reached).all())
        yield "as many entries are in FAISS", int(base.owner.ntotal) == base.entries
        yield "the base hides what is no row", base.visible.hidden == base.entries - len(seen)
