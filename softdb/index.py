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
import re
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import faiss  # after torch: so that both share one OpenMP runtime

from softdb._checks import check_above_zero, check_number, describe
from softdb.blockwise import Scan, exact_top_k, scores_at, top_k
from softdb.errors import ArgumentError, DtypeError, IndexBuildError
from softdb.filters import Selection, select
from softdb.processes import is_openmp_used, note_openmp, run_in_forked_children
from softdb.rows import RowTable, resized
from softdb.scoring.metrics import centre_of, compute_dtype, prepare_query
from softdb.tail import FIRST_QUERY_COST, Outline

__all__ = ["Index", "IndexConfig", "IndexStats"]

# Where an IVF search that finds 95 % gets faster than an exact one: measured from 200,000 rows on for single queries
# and by a million for 256 at a time (benchmarks/index_crossover.py).
EXACT_ROWS = 500_000
# IVF lists of an "auto" index, for each square root of a row: FAISS advises 4 to 16.
LISTS = 4
# A filter that leaves at most this fraction of the rows leaves so few that an exact top-k over them is cheaper.
FEW = 1 / 32
# The base takes pending rows in when they are more than this many, or than this share of it.
PENDING_ROWS, PENDING_SHARE = 4096, 1 / 8
# Where a step has moved this share of the rows, exact searches are cheaper than keeping up, until steps get smaller.
MASS = 1 / 4
# What a build costs, beside finding lists: as many products with a query for each row.
BUILD_PRODUCTS = 1024
# A row has its list chosen again when it has come this far since, relative to the scale of the keys, and when it comes
# this far at once.
LIST_TOLERANCE, JUMP_TOLERANCE = 1.0, 0.25
# Keys this long overflow when they are compared, and FAISS aborts the process: they are left out.
LONGEST = 1e18
# How far a row is from the nearest in a sample tells whether rows lie in clusters: below this part of the distance from
# their middle.
CLUSTERED = 4
# An IVF base is trained anew when it holds this many times the rows that its lists were trained for, or its lists are
# this much less even than they were.
OUTGROWN, UNBALANCED = 4, 2
# Queries, and neighbours of each at the least and the most, that the probes are tuned on; how many of a read's own tell
# a recall of theirs; and how many when it is checked again, after the base has taken in so many times its rows, at the
# least and the most.
TUNING_QUERIES, NEIGHBOURS, MOST_NEIGHBOURS = 256, 32, 256
TELLING_QUERIES = 8
CHECKING_QUERIES, CHECKING_SHARES = 64, (1 / 4, 1 / 2)
FEWEST_PROBES = 1
# The recall is checked on the latest queries after so many, then twice as many as long as nothing changes, until checks
# cost this share of the searches.
CHECK_AFTER, DRIFT_SHARE = 4096, 1 / 20
# Neighbours that a step in a graph looks at, about.
GRAPH_DEGREE = 32
# A measured recall says no more than that so few are missed.
FEWEST_MISSES = 1e-4
# A recall as near to the wanted one is left alone when it is checked: the sample is small.
NEAR_ENOUGH = 0.01
# A careful search visits this many times the lists, unless it then costs more than this share of an exact one.
CAREFUL, CAREFUL_SHARE = 2, 1 / 8
# For dot products, in a base of some size, the longest rows may be searched exactly beside it: up to this share of all,
# if the least of them is this much longer than the median.
CROWNED_ENTRIES, CROWN_SHARE, CROWN_RATIO = 2**14, 1 / 16, 1.2
# Rows that have moved by less than the tolerance come in a slightly wrong order: this share more of them are asked for.
SLACK = 0.25
# An outline of the rows by lists is made anew when the base has taken in this share of its entries; as many rows of a
# list tell where it lies.
OUTLINE_SHARE, OUTLINE_ROWS = 1 / 8, 32
UNBOUNDED = ("dot", "scaled_dot")
# A row visited in a list costs as much as this many in an exact search of all, and a row of the crown as this many; a
# crown costs as much as if it were so many rows larger.
VISIT_COST, CROWN_COST, CROWN_ROWS = 10, 2, 2**14
# As many numbers are compared with their copies at a time.
COMPARED_ELEMENTS = 2**22
# The keys of so many rows are compared with the index's before each search.
SAMPLE_ROWS = 64
# Under which names FAISS's indexes hold others, and the quantizers of their codes.
INNER_INDEXES = ("index", "base_index", "refine_index", "quantizer", "storage")
QUANTIZERS = ("pq", "refine_pq", "rq", "lsq", "prq", "plsq")
# FAISS trains an OPQ transformation for codes of so many bits.
OPQ_BITS = 8


@dataclass(frozen=True)
class IndexConfig:
    """How a store finds the candidates of a top-k read.

    Args:
        factory: "auto" (exact below a measured number of rows, FAISS IVF above), "Flat" (softdb's own exact top-k;
            no FAISS object is built), or a FAISS factory string such as "IVF1024,Flat" or "HNSW32".
        recall: The fraction of the true k best rows that the search is to find. IVF probes and HNSW's efSearch are
            raised, when the index is built, until a sample of queries finds as many, and checked again after a
            quarter of the rows has moved.
        tolerance: How far a key may be moved by an optimiser before the index takes note, relative to the keys' median
            distance from their middle: for keys about the origin that is their norm (of normalised keys, for
            metric="cosine"), and less where they lie in clusters far apart. Scores come from the keys as they are in
            any case. 0 takes note of every move. To know, the index keeps a float32 copy of a trainable store's keys.
        garbage: The share of the index's entries that may be of rows changed or deleted before it is built anew.
        background: Whether to build in a thread of its own: until it is done, and rows change the next time, searches
            go on with what is there. Off, so that results never depend on timing.
    """

    factory: str = "auto"
    recall: float = field(default=0.95, kw_only=True)
    tolerance: float = field(default=0.02, kw_only=True)
    garbage: float = field(default=0.5, kw_only=True)
    background: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str):
            raise DtypeError(
                f"factory: expected 'auto', 'Flat' or a FAISS factory string, got {describe(self.factory)}"
            )
        for name in ("recall", "garbage"):
            object.__setattr__(self, name, check_above_zero(name, getattr(self, name), most=1))
        object.__setattr__(self, "tolerance", check_number("tolerance", self.tolerance))
        if not isinstance(self.background, bool):
            raise DtypeError(f"background: expected True or False, got {describe(self.background)}")


@dataclass(frozen=True)
class IndexStats:
    """What the index is and what it has cost.

    Attributes:
        rows: Rows in the store.
        pending: Rows that searches go through exactly because the base does not hold them as they are.
        factory: The FAISS factory string of the base; "Flat" where searches are exact.
        nprobe: IVF lists visited per query; None for other indexes.
        recall: Measured on a sample of queries when the base was built, or checked last; 1.0 where there is none. Reads
            search exactly where the base would be slower: then they find everything.
        builds: How often a base has been built.
        search_seconds, upkeep_seconds, rebuild_seconds: Time spent so far in searching; in noting changes, taking rows
            in and checking the recall; and in building.
        error: Why the last build failed; searches are exact until the next. None if it did not.
    """

    rows: int
    pending: int
    factory: str
    nprobe: int | None
    recall: float | None
    builds: int
    search_seconds: float
    upkeep_seconds: float
    rebuild_seconds: float
    error: str | None


# -- processes and threads -------------------------------------------------------------------------------

_indexes: weakref.WeakSet[Index] = weakref.WeakSet()


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


# -- the base --------------------------------------------------------------------------------------------


class _Visible:
    """Which entries of a base searches may find: a bitmap as FAISS takes it, and how many are hidden."""

    def __init__(self, entries: int) -> None:
        self._bitmap = np.packbits(np.ones(entries, dtype=bool), bitorder="little")
        self._entries = entries
        self.hidden = 0

    def at(self, entries: Tensor) -> Tensor:
        """Whether each of ``entries`` is visible."""
        numbers = entries.numpy()
        return torch.from_numpy((self._bitmap[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1).astype(bool))

    def all(self) -> Tensor:
        """Whether each entry is visible."""
        return torch.from_numpy(np.unpackbits(self._bitmap, count=self._entries, bitorder="little").astype(bool))

    def selector(self) -> Any:
        """For a FAISS search."""
        return faiss.IDSelectorBitmap(self._bitmap)

    def show(self, entries: Tensor) -> None:
        """Let searches find ``entries``, each given once."""
        self.hidden -= len(entries) - int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_or.at(self._bitmap, numbers >> 3, np.uint8(1) << (numbers & 7).astype(np.uint8))

    def hide(self, entries: Tensor) -> None:
        """Keep searches from finding ``entries``, each given once."""
        self.hidden += int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_and.at(self._bitmap, numbers >> 3, ~(np.uint8(1) << (numbers & 7).astype(np.uint8)))

    def extend(self, count: int) -> None:
        """Add entries, visible."""
        bits = np.concatenate([self.all().numpy(), np.ones(count, dtype=bool)])
        self._bitmap = np.packbits(bits, bitorder="little")
        self._entries += count


class _Base:
    """A FAISS index over rows as it took them in.

    Entry e of it is the row in slot ``slots[e]``, and ``entry_of`` gives the latest entry of a slot, -1 where there is
    none. Entries whose row has changed or is gone are hidden. A plain inverted file takes a row in again under its old
    entry, which moves to another list or stays; any other index under a new one, and the old is garbage.

    Attributes:
        crown: The slots of the longest rows, which the owner searches exactly: they are hidden.
        crown_norm: From which norm on rows belong there.
        copy: The rows as taken in, (capacity, d) float32, beside the keys; None if nobody moves them.
        scale: What a move is far beside: the median distance of the rows from their middle, or, where they lie in
            clusters, a few times that from the nearest of a sample.
    """

    def __init__(self, owner: Any, factory: str, slots: Tensor, rows: Tensor, capacity: int, *, copied: bool) -> None:
        self.owner = owner  # the FAISS index: what FAISS gives as its parts or other types dies with it
        self.factory = factory
        self.slots = slots  # on the CPU, as are the next
        self.entry_of = torch.full((capacity,), -1, dtype=torch.int64, device="cpu")
        self.entry_of[slots] = torch.arange(len(slots), device="cpu")
        self.visible = _Visible(len(slots))
        self._can_widen = _accepts(self.index, None, 1)
        self._can_select = isinstance(_core(self.index), faiss.IndexIVF) and _accepts(
            self.index, self.visible.selector(), None
        )
        self.in_order = len(slots) == 0 or int(slots[-1]) == len(slots) - 1  # entry e is slot e, since they ascend
        self.crown, self.crowned, self.crown_norm = slots[:0], 0, math.inf
        self.check_after = CHECKING_SHARES[0]
        self.taken = 0  # rows taken in since the recall was checked
        self._outline: Outline | None = None
        self._outlined = 0  # rows taken in since
        self.trained_rows, self.imbalance = len(slots), self._imbalance()
        self.recall: float | None = None
        self.told = 0  # by how many queries that were asked; else by made-up ones
        self.neighbours = 0  # of which that is the share found
        self.next_check = CHECK_AFTER  # after as many queries
        self.scale = _scale(rows)
        self.copy: Tensor | None = None
        self._drift: Tensor | None = None  # (capacity,): how far rows have come since their list was chosen
        if copied:
            self.copy = rows if len(rows) == capacity and self.in_order else rows.new_zeros(capacity, rows.shape[1])
            if self.copy is not rows:
                self.copy[slots.to(rows.device)] = rows
            self._drift = torch.zeros(capacity, device="cpu")
        self._sample_slots = slots[:: max(1, len(slots) // SAMPLE_ROWS)][:SAMPLE_ROWS].to(rows.device)
        self._sample_keys: Tensor | None = None

    def follow_sample(self, rows: RowTable, keys: Tensor, version: int) -> None:
        """Copy the sampled keys that are known to have changed after ``version``, or all of them at first."""
        slots = self._sample_slots
        if self._sample_keys is None:
            self._sample_keys = keys.index_select(0, slots)
        elif self.copy is None:
            known = (rows.keys_changed_at[slots] > version) | (rows.keys_moved_at > version)
            self._sample_keys[known] = keys[slots[known]]

    def has_stale_sample(self, keys: Tensor, metric: str, tolerance: float) -> bool:
        """Whether the key of a sampled row is another than the index's, though every known write was followed."""
        if self._sample_keys is None:
            return False
        present = keys.index_select(0, self._sample_slots)
        if torch.equal(present, self._sample_keys):
            return False
        if self.copy is None:
            return True
        seen = self._sample_slots[self.sees(self._sample_slots.cpu()).to(keys.device)]
        if len(self.moved(seen, keys, metric, tolerance)):
            return True
        self._sample_keys = present
        return False

    @property
    def index(self) -> Any:
        """The FAISS index under its own type."""
        return faiss.downcast_index(self.owner)

    @property
    def entries(self) -> int:
        return len(self.slots)

    @property
    def lists(self) -> int:
        """How many lists entries move between; 0 where they cannot."""
        ivf = _movable(self.index)
        return 0 if ivf is None else int(ivf.nlist)

    @property
    def probes(self) -> int | None:
        """IVF lists visited by each query."""
        ivf = _ivf(self.index)
        return None if ivf is None else int(ivf.nprobe)

    @property
    def share(self) -> float:
        """The share of the lists that each query visits; 0 where there are none."""
        ivf = _ivf(self.index)
        return 0.0 if ivf is None else float(ivf.nprobe / ivf.nlist)

    @property
    def looked_at(self) -> float:
        """The share of the entries that each query looks at, about."""
        core = _core(self.index)
        if isinstance(core, faiss.IndexHNSW):
            return float(min(1.0, core.hnsw.efSearch * GRAPH_DEGREE / max(1, self.entries)))
        return self.share or 1.0

    @property
    def is_exact_at_full_width(self) -> bool:
        """Whether a search of all lists finds the best rows, so that each one more brings it nearer to that.

        Not where codes or projections lose something, nor in a graph, some of whose rows no search reaches.
        """
        if not isinstance(_core(self.index), faiss.IndexIVFFlat):
            return False
        changes = [part for part in _parts(self.index) if isinstance(part, faiss.VectorTransform)]
        return all(part.d_in == part.d_out and getattr(part, "is_orthonormal", False) for part in changes)

    @property
    def effort(self) -> tuple[int, int]:
        """What trades time for recall, and its largest useful value; 0 where a search cannot choose it."""
        knob, name, limit = _knob(self.index)
        return (int(getattr(knob, name)), int(limit)) if self._can_widen else (0, 0)

    def exert(self, effort: int) -> None:
        """Search with so much effort from now on."""
        knob, name, _ = _knob(self.index)
        if self._can_widen:
            setattr(knob, name, effort)

    def sees(self, slots: Tensor) -> Tensor:
        """At which of ``slots`` there is a row that searches may find."""
        entries = self.entry_of[slots]
        return (entries >= 0) & self.visible.at(entries.clamp(min=0))

    def search(  # (B, d), (used,) bool -> (B, c)
        self, queries: Any, k: int, allowed: Tensor | None = None, *, effort: int | None = None
    ) -> Tensor:
        """Slots of ``k`` or more rows, -1 where fewer were found; with another ``effort``, where FAISS can, if given.

        Among them may be some that are not ``allowed``, where FAISS cannot leave them out.
        """
        index = self.index
        if self.copy is not None:
            k += round(SLACK * k)
        selector, hidden = None, self.visible.hidden > 0
        if hidden or allowed is not None:
            if not self._can_select:
                k *= 2
            elif allowed is None:
                selector, hidden = self.visible.selector(), False
            else:
                bits = np.packbits((self.visible.all() & allowed[self.slots]).numpy(), bitorder="little")
                selector, hidden = faiss.IDSelectorBitmap(bits), False
        parameters = None
        if selector is not None or effort is not None:
            parameters = _search_parameters(index, selector, effort)
        entries = torch.from_numpy(index.search(queries, min(k, self.entries), params=parameters)[1])
        if self.in_order and not hidden:
            return entries
        places = entries.clamp(min=0)
        missing = entries < 0
        if hidden:
            missing |= ~self.visible.at(places)
        return self.slots[places].masked_fill_(missing, -1)

    def moved(self, slots: Tensor, keys: Tensor, metric: str, tolerance: float) -> Tensor:
        """Those of ``slots`` whose key is no longer where it was taken in, by more than ``tolerance``."""
        if self.copy is None:
            return slots
        apart = []
        for part in slots.split(max(1, COMPARED_ELEMENTS // keys.shape[1])):
            apart.append(_distance(_prepared(keys.index_select(0, part), metric), self.copy.index_select(0, part)))
        distance = torch.cat(apart) if apart else slots.new_zeros(0)
        return slots[~(distance <= tolerance * self.scale)]  # so that NaN has moved

    def hide(self, slots: Tensor) -> None:
        """Keep searches from finding ``slots``."""
        entries = self.entry_of[slots]
        self.visible.hide(entries[entries >= 0])

    def take(self, slots: Tensor, rows: Tensor) -> None:  # (m,) ascending, on the CPU; (m, d) finite
        """Take rows in as they are now, and show them."""
        if len(slots) == 0:
            return
        self.taken += len(slots)
        self._outlined += len(slots)
        entries = self.entry_of[slots]
        known = (entries >= 0) & bool(self.lists)
        if bool(known.all()):
            self._move(entries, slots, rows)
        else:
            if bool(known.any()):
                self._move(entries[known], slots[known], rows[known.to(rows.device)])
            self._append(slots[~known], rows[~known.to(rows.device)])
        if self.copy is not None:
            self.copy.index_copy_(0, slots.to(rows.device), rows)

    def _move(self, entries: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Put entries of an inverted file where they belong now."""
        ivf, vectors = _movable(self.index), _within(self.index, _array(rows))
        lists = self.lists_of(entries)
        astray = torch.ones(len(slots), dtype=torch.bool, device="cpu")
        if self.copy is not None and self._drift is not None:
            moved = _distance(rows, self.copy.index_select(0, slots.to(rows.device))).cpu()
            drift = self._drift[slots] + moved
            astray = ~((drift <= LIST_TOLERANCE * self.scale) & (moved <= JUMP_TOLERANCE * self.scale))
            self._drift[slots] = drift.masked_fill_(astray, 0.0)
        if bool(astray.any()):
            lists[astray.numpy()] = ivf.quantizer.search(vectors[astray.numpy()], 1)[1].ravel()
        codes = np.empty((len(vectors), ivf.code_size), dtype=np.uint8)
        numbers = entries.numpy()
        ivf.encode_vectors(len(vectors), *map(faiss.swig_ptr, (vectors, lists, codes)))
        ivf.direct_map.update_codes(ivf.invlists, len(vectors), *map(faiss.swig_ptr, (numbers, lists, codes)))
        self.visible.show(entries)

    def _append(self, slots: Tensor, rows: Tensor) -> None:
        first = self.entries
        self.owner.add(_array(rows))
        self.hide(slots)
        self.entry_of[slots] = torch.arange(first, first + len(slots), device="cpu")
        self.in_order &= int(slots[0]) == first and int(slots[-1]) == first + len(slots) - 1
        self.slots = torch.cat([self.slots, slots])
        self.visible.extend(len(slots))
        if self._drift is not None:
            self._drift[slots] = 0.0

    def lists_of(self, entries: Tensor) -> Any:
        """The IVF lists that entries are in, as an int64 array."""
        ivf = _movable(self.index)
        return faiss.rev_swig_ptr(ivf.direct_map.array.data(), ivf.ntotal)[entries.numpy()] >> 32

    def outline(self, keys: Tensor, size: int) -> Outline | None:
        """The slots below ``size`` by lists, as they were not long ago; None where there are no lists."""
        if not self.lists:
            return None
        if self._outline is None or self._outlined > OUTLINE_SHARE * self.entries:
            number = torch.full((size,), self.lists, dtype=torch.int64, device="cpu")  # those in no list come last
            listed = (self.entry_of[:size] >= 0).nonzero().squeeze(-1)
            number[listed] = torch.from_numpy(self.lists_of(self.entry_of[listed]))
            order, counts = number.argsort(stable=True), number.bincount(minlength=self.lists + 1)
            some = counts.unsqueeze(-1) * torch.arange(OUTLINE_ROWS, device="cpu") // OUTLINE_ROWS
            some = order[(some + (counts.cumsum(0) - counts).unsqueeze(-1)).clamp_(max=max(0, size - 1))]
            means = keys[some.flatten().to(keys.device)].view(*some.shape, -1).mean(1, dtype=compute_dtype(keys))
            self._outline = Outline(order.to(keys.device), counts.to(keys.device), means)
            self._outlined = 0
        return self._outline

    def widen(self, capacity: int) -> None:
        """Make room for slots."""
        if capacity > len(self.entry_of):
            self.entry_of = resized(self.entry_of, capacity, fill=-1)
            self.copy = None if self.copy is None else resized(self.copy, capacity)
            self._drift = None if self._drift is None else resized(self._drift, capacity)

    def _imbalance(self) -> float:
        """How uneven the lists are: 1 if all are as long."""
        ivf = _movable(self.index)
        return 1.0 if ivf is None else float(ivf.invlists.imbalance_factor())

    def inherit(self, old: _Base) -> None:
        """Take over what is known of the lists that were trained for ``old``."""
        self.trained_rows, self.imbalance = old.trained_rows, old.imbalance

    def is_outworn(self, rows: int) -> bool:
        """Whether lists trained anew would serve ``rows`` rows better."""
        if _ivf(self.index) is None:
            return False
        return rows > OUTGROWN * self.trained_rows or self._imbalance() > UNBALANCED * self.imbalance

    def tune(
        self,
        groups: list[Tensor],  # of queries, (m, d)
        keys: Tensor,  # (capacity, d)
        metric: str,
        selection: Selection,
        wanted: float,
        neighbours: int,
    ) -> None:
        """Find how much to probe, and how many rows to crown, until each group finds ``wanted`` of its best rows.

        There is no crown when it begins: what is in none has to be visible.

        Args:
            groups: Queries.
            keys: The rows as they are.
            metric: How they meet.
            selection: In which slots there are rows.
            wanted: The recall.
            neighbours: Of so many best rows.
        """
        self.taken, self.crown, self.neighbours = 0, self.crown[:0], neighbours
        k = min(neighbours, self.entries)
        queries = torch.cat(groups)
        scan, operand, best, worst = _truth(queries, keys, metric, selection, k)
        crowning = metric in UNBOUNDED and self.entries >= CROWNED_ENTRIES
        longest = _longest(keys, selection) if crowning else best.new_empty(0)
        rank = best.new_full((len(keys),), len(keys))
        rank[longest] = torch.arange(len(longest), device=rank.device)
        vectors, sizes = _array(_prepared(queries, metric)), [len(group) for group in groups]
        knob, name, limit = _knob(self.index)

        def measure(probes: int, crown: int) -> tuple[float, float]:
            """The recall of the queries, and what it is for certain but for the chance in drawing them."""
            if knob is not None:
                setattr(knob, name, probes)
            found = self.search(vectors, k).to(keys.device)
            hits = (scores_at(operand, keys, found, scan) >= worst) & (found >= 0)
            hits &= rank[found.clamp(min=0)] >= crown  # not twice
            held = (rank[best.clamp(min=0)] < crown) & (best >= 0)
            shares = ((hits.sum(-1) + held.sum(-1)).clamp(max=k) / k).split(sizes)
            chance = [float(part.std()) / math.sqrt(len(part)) if len(part) > 1 else 0.0 for part in shares]
            means = [float(part.mean()) for part in shares]
            return min(means), min(mean - off for mean, off in zip(means, chance, strict=True))

        levels = self._levels(limit if knob is not None else 0, len(longest))
        level, again, now = 0, self.recall is not None, (0, 0)
        if again:
            now = (0 if knob is None else getattr(knob, name), self.crowned)
            level = sum(probes < now[0] or crown < now[1] for probes, crown in levels[:-1])
        probes, crown = levels[level]
        recall, sure = measure(probes, crown)
        # Tuned on a sample, to be right for others: beyond chance. Checked on a smaller one: not moved by chance.
        lacks = recall < wanted - NEAR_ENOUGH if again else sure < wanted
        if lacks:
            # The sample is the same for all levels: where it is a hard one, the wanted recall is far off.
            while (recall < wanted - NEAR_ENOUGH / 2 if again else sure < wanted) and level < len(levels) - 1:
                level += 1
                probes, crown = levels[level]
                recall, sure = measure(probes, crown)
        elif recall > wanted + NEAR_ENOUGH and level > 0:
            lower = measure(*levels[level - 1])
            if lower[not again] >= wanted:
                level, recall = level - 1, lower[0]
            probes, crown = levels[level]
        few = levels[level - 1][0] if level else probes
        while probes - few > max(1, probes // 8):
            middle = (few + probes) // 2
            found = measure(middle, crown)
            if found[not again] >= wanted:
                probes, recall = middle, found[0]
            else:
                few = middle
        if knob is not None:
            setattr(knob, name, probes)
        self.recall, self.next_check = recall, CHECK_AFTER
        if again:  # the more often, the more there is to be changed
            interval = self.check_after * (0.5 if (probes, crown) != now else 2)
            self.check_after = min(max(interval, CHECKING_SHARES[0]), CHECKING_SHARES[1])
        last = longest[crown - 1 : crown] if crown else longest[:1]
        self.crown_norm = float(torch.linalg.vector_norm(keys[last], dtype=torch.float32)) if len(last) else math.inf
        self.crown, self.crowned = longest[:crown].sort().values.cpu(), crown
        self.hide(self.crown)

    def _levels(self, limit: int, longest: int) -> list[tuple[int, int]]:
        """Probes up to ``limit`` and sizes of a crown up to ``longest``, from the cheapest on, in doublings."""
        probes, crown = min(FEWEST_PROBES, limit), 0
        visited = self.entries / max(1, self.lists)  # rows a probe, in lists
        levels = [(probes, crown)]
        while probes < limit or crown < longest:
            if crown < longest and (
                probes == limit or CROWN_COST * (crown + CROWN_ROWS) < VISIT_COST * probes * visited
            ):
                crown = min(longest, max(64, 2 * crown))
            else:
                probes = min(limit, 2 * probes)
            levels.append((probes, crown))
        return levels


@dataclass
class _Plan:
    """What a build needs to know, so that it needs nobody meanwhile.

    Attributes:
        version: Of the rows.
        slots: (n,) ascending, on the CPU.
        rows: (n, d) as FAISS takes them.
        keys: (capacity, d); None if ``rows`` are copied, so that nobody writes to them.
        left_out: The slots of rows that are not finite.
        capacity: How many slots there are.
        factory: FAISS's factory string.
        old: The base whose trained lists are to be used again, or None to train new ones.
        empty: An index with those lists.
        lists: Which of them each row is in, int64, -1 where that is to be found.
        queries: To tune on.
        metric, recall: As in the configuration.
        neighbours: To tune for.
        told: How many of the queries were asked.
    """

    version: int
    slots: Tensor
    rows: Tensor
    keys: Tensor | None
    left_out: Tensor
    capacity: int
    factory: str
    old: _Base | None
    empty: Any
    lists: Any
    queries: list[Tensor]
    metric: str
    recall: float
    neighbours: int
    told: int

    def carry_out(self) -> _Built:
        """Build."""
        started = time.perf_counter()
        base, error = None, None
        try:
            with torch.no_grad():
                base = self._base()
        except Exception as failure:  # whatever FAISS raises, and no memory left: there are exact searches
            error = _reason(failure)
        rows = len(self.slots) + len(self.left_out)
        return _Built(self.version, base, self.left_out, rows, time.perf_counter() - started, error)

    def _base(self) -> _Base:
        vectors = _array(self.rows)
        index = self.empty
        if index is None:
            index = faiss.index_factory(vectors.shape[1], self.factory, _faiss_metric(self.metric))
            _train(index, vectors)
            ivf = _movable(index)
            if ivf is not None:
                ivf.set_direct_map_type(faiss.DirectMap.Array)
            index.add(vectors)
        else:
            _fill(index, vectors, self.lists)
        base = _Base(index, self.factory, self.slots, self.rows, self.capacity, copied=self.keys is None)
        if self.old is not None:
            base.inherit(self.old)
        keys = self.keys if base.copy is None else base.copy
        held = base.entry_of.to(self.rows.device) >= 0
        everything = Selection(len(held), shared=None if bool(held.all()) else held)
        base.told = self.told
        base.tune(
            self.queries, self.rows if keys is None else keys, self.metric, everything, self.recall, self.neighbours
        )
        return base


@dataclass(frozen=True)
class _Built:
    """What came of a plan: a base, or the reason why there is none."""

    version: int
    base: _Base | None
    left_out: Tensor
    rows: int
    seconds: float
    error: str | None


class _Aside:
    """A build in a thread of its own."""

    def __init__(self, plan: _Plan) -> None:
        self._built: _Built | None = None
        self._thread = threading.Thread(target=self._run, args=(plan,), name="softdb index build")
        self._thread.start()

    def _run(self, plan: _Plan) -> None:
        self._built = plan.carry_out()

    @property
    def is_done(self) -> bool:
        """Whether `result` does not wait."""
        return not self._thread.is_alive()

    def result(self) -> _Built | None:
        """What came of it, once it is done; None if it broke off."""
        self._thread.join()
        return self._built


# -- the index -------------------------------------------------------------------------------------------


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


class Index:
    """Finds candidate slots for queries, whatever happened to the rows since the last search.

    Args:
        config: What index to keep.
        metric: How rows are scored.
        key_dim: Width of the keys.
        moving: Whether optimisers move the keys.

    Raises:
        ArgumentError: FAISS does not know the factory string.
    """

    def __init__(self, config: IndexConfig, metric: str, key_dim: int, *, moving: bool) -> None:
        self.config = config
        self._metric, self._moving = metric, moving
        self._rows_to_train = 1
        if config.factory not in ("auto", "Flat"):
            wanted = f"index: expected 'auto', 'Flat' or a FAISS factory string for width {key_dim}, got"
            try:
                index = faiss.index_factory(key_dim, config.factory, _faiss_metric(metric))
            except RuntimeError as error:
                raise ArgumentError(f"{wanted} {config.factory!r}, which FAISS refuses: {_reason(error)}") from error
            if any(isinstance(part, faiss.IndexIDMap) for part in _parts(index)):
                raise ArgumentError(
                    f"{wanted} {config.factory!r}; leave out IDMap, since softdb numbers the rows itself"
                )
            self._rows_to_train = _rows_to_train(index)
        self._builds = 0
        self._search_seconds = self._upkeep_seconds = self._rebuild_seconds = 0.0
        self.reset()
        self._begin()

    def _begin(self) -> None:
        self._lock: Any = threading.RLock()
        self._aside: _Aside | None = None
        note_openmp()  # every store has an index
        _indexes.add(self)

    def reset(self) -> None:
        """Forget the base: rows were loaded or converted."""
        self._base: _Base | None = None
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
        rows: RowTable,
        scan: Scan,
        k: int,
        *,
        careful: bool = False,
    ) -> Found:
        """The k best rows of each query, as far as the index finds them; with ``careful``, more of them."""
        query, operand, keys = query.detach(), operand.detach(), keys.detach()
        selection = scan.selection
        if self._is_interrupted:
            return Found(exact_top_k(operand, keys, scan, k)[1], True, 1.0)
        with self._lock, torch.inference_mode(False):
            if self._noted is None or query.data_ptr() != self._noted.data_ptr():
                self._note_queries(query, k)
            self._noted = None
            base = self._awake
            if self._asleep:
                self._searched += len(query)
            if base is not None and _pays(base, rows, selection, k, len(query)):
                self._asked += len(query)
                self._follow_queries(base, rows, keys)
            beside = self._beside
        started = time.perf_counter()
        try:
            if base is None or not _pays(base, rows, selection, k, len(query)):
                return Found(exact_top_k(operand, keys, scan, k)[1], True, 1.0)
            effort, recall = self._effort(base, len(query), k * len(rows) / selection.shared_count, careful)
            found = self._find(base, beside, query, operand, keys, rows, scan, k, effort)
            missing = found < 0
            if bool(missing.any()):
                short = ((~missing).sum(-1) < k).nonzero().squeeze(-1)
                rest = Scan(scan.metric, scan.centre, selection.take(short), scan.dtype)
                found[short] = exact_top_k(operand[short], keys, rest, k)[1]
            return Found(found, False, recall)
        finally:
            self._search_seconds += time.perf_counter() - started

    def _effort(self, base: _Base, queries: int, neighbours: float, careful: bool) -> tuple[int | None, float]:
        """How much to search for so many neighbours, and the recall that is to be expected.

        Of some of the rows, those that a filter leaves, the k best lie as far apart as more of all rows do.
        """
        recall = min(base.recall or 0.0, 1 - FEWEST_MISSES)
        now, limit = base.effort
        wanted = now * math.sqrt(max(1.0, neighbours / max(1, base.neighbours)))
        if base.probes is None:
            wanted = max(wanted, neighbours)  # a search in a graph is at least as wide, whatever efSearch says
        effort = min(limit, math.ceil(wanted))
        if careful and CAREFUL * wanted / max(1, now) * _cost(base, queries) < CAREFUL_SHARE:
            usual, effort = effort, min(limit, math.ceil(CAREFUL * wanted))
            if limit and base.is_exact_at_full_width:
                recall = 1 - (1 - recall) * usual / effort
        return (None if effort == now else effort), recall

    def _find(
        self,
        base: _Base,
        beside: Tensor,
        query: Tensor,
        operand: Tensor,
        keys: Tensor,
        rows: RowTable,
        scan: Scan,
        k: int,
        effort: int | None,
    ) -> Tensor:  # (B, k)
        """The best rows of the base and of those that are searched beside it."""
        found = self._search_base(base, query, rows, scan, k, effort)  # (B, c)
        if len(beside):
            visible = Scan(scan.metric, scan.centre, scan.selection.among(beside), scan.dtype)
            found = torch.cat([found, exact_top_k(operand, keys, visible, k)[1]], dim=-1)
        return _best_of(found, operand, keys, scan, k) if found.shape[-1] > k else found

    def approximates(self, rows: RowTable, selection: Selection, k: int, queries: int) -> bool:
        """Whether a search for k rows of each query would not be exact, which is when that is cheaper."""
        base = self._awake
        return base is not None and _pays(base, rows, selection, k, queries)

    @property
    def _awake(self) -> _Base | None:
        """The base, where searches may use it."""
        return None if self._asleep or self._unsure else self._base

    def _search_base(
        self, base: _Base, query: Tensor, rows: RowTable, scan: Scan, k: int, effort: int | None
    ) -> Tensor:
        selection = scan.selection
        wanted = k
        if selection.excluded is not None:
            wanted += selection.excluded.shape[-1]
        if selection.rule is not None:
            wanted *= 4
        filtered = None if selection.shared is rows.live() else selection.shared
        allowed = None if filtered is None else filtered.cpu()
        slots = base.search(_array(_prepared(query, self._metric)), wanted, allowed, effort=effort).to(query.device)
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

    def is_current(self, rows: RowTable) -> bool:
        """Whether searches need no `follow` before."""
        return rows.version == self._version and not self._unsure

    def follow(self, rows: RowTable, keys: Tensor, query: Tensor, k: int) -> None:
        """Take note of every change to the rows, for a search of ``query``, while nobody else searches."""
        if self._is_interrupted:
            return
        with self._changing():
            self._note_queries(query.detach(), k)
            self._noted = query.detach()
            self._follow(rows, keys)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the index; where that breaks off anywhere, there is none any more."""
        with self._lock, torch.inference_mode(False):
            if self._unsure:
                self.reset()
            self._unsure = True
            yield
            self._unsure = False

    def _follow(self, rows: RowTable, keys: Tensor) -> None:
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

    def _follow_queries(self, base: _Base, rows: RowTable, keys: Tensor) -> None:
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
        affordable = (CHECKING_QUERIES + FIRST_QUERY_COST) / (DRIFT_SHARE * VISIT_COST * base.looked_at)
        longer = 2 * base.next_check if now == before else CHECK_AFTER
        base.next_check, self._asked = max(CHECK_AFTER, min(longer, math.ceil(affordable))), 0

    def _measured_effort(
        self, base: _Base, queries: Tensor, rows: RowTable, keys: Tensor, *, beyond_chance: bool
    ) -> tuple[int, float]:
        """The least effort, about, with which queries find as many of their best rows as wanted, and how many."""
        wanted, k = self.config.recall, min(self._neighbours, len(rows))
        selection = select(rows, (), None, None)
        scan, operand, _, worst = _truth(queries, keys, self._metric, selection, k)

        def measure(effort: int) -> tuple[float, bool]:
            found = self._find(base, self._beside, queries, operand, keys, rows, scan, k, effort or None)
            shares = ((scores_at(operand, keys, found, scan) >= worst) & (found >= 0)).sum(-1) / k
            recall = float(shares.mean())
            chance = float(shares.std()) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
            return recall, recall - chance >= wanted if beyond_chance else recall >= wanted - NEAR_ENOUGH

        now, limit = base.effort
        recall, enough = measure(now)
        few = now
        while not enough and now < limit:
            few, now = now, min(limit, 2 * now)
            recall, enough = measure(now)
        if few == now and recall > wanted + NEAR_ENOUGH:
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

    def _note_changes(self, base: _Base, rows: RowTable, keys: Tensor) -> None:
        outdated, moved = self._outdated(base, rows, keys)
        if moved > MASS * len(rows):
            self._asleep, self._searched = True, 0
            self._patience *= 2
            return
        self._patience = max(1, self._patience // 2)
        base.hide(outdated.cpu())
        self._pending = self._pending_with(outdated, base, rows)

    def _outdated(self, base: _Base, rows: RowTable, keys: Tensor) -> tuple[Tensor, int]:
        """The slots that the base shows as they no longer are, and how many of them have been moved, not written."""
        changed = rows.changed_since(self._version, keys=True)
        written = rows.keys_written_at[changed] > self._version
        moving = changed[~written & (changed < len(base.entry_of))]
        moved = base.moved(moving[base.sees(moving.cpu()).to(moving.device)], keys, self._metric, self.config.tolerance)
        return torch.cat([changed[written], moved]), len(moved)

    def _pending_with(self, changed: Tensor, base: _Base, rows: RowTable) -> Tensor:
        """The pending slots once ``changed`` ones are, too; a slot without a row is not, nor one of the crown."""
        pending: Tensor = torch.cat([self._pending.to(changed.device), changed]).unique()
        pending = pending[rows.ids[pending] >= 0]
        return pending[~torch.isin(pending, base.crown.to(pending.device))] if len(base.crown) else pending

    def _settle(self, rows: RowTable, keys: Tensor, *, now: bool = False) -> None:
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
            elif len(self._pending) > (0 if now else min(PENDING_ROWS, PENDING_SHARE * base.entries)):
                self._take(base, rows, keys)

    def _drop(self) -> None:
        self._base, self._asleep = None, False
        self._pending = torch.empty(0, dtype=torch.int64, device="cpu")

    def _take(self, base: _Base, rows: RowTable, keys: Tensor) -> None:
        """Let the base take the pending rows in, or the crown; not those that training has led to infinity."""
        with self._upkeep():
            check = base.taken + len(self._pending) > base.check_after * base.entries
            if check:  # whether a row belongs to the crown is to be found out, so none does
                crown, base.crown = base.crown, base.crown[:0]
                self._pending = self._pending_with(crown.to(self._pending.device), base, rows)
            vectors = _prepared(keys.index_select(0, self._pending), self._metric)
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

    def _check_recall(self, base: _Base, rows: RowTable, keys: Tensor) -> None:
        """Tune the probes to the rows as they are now."""
        live = rows.live_slots()
        sample = _prepared(keys[live[:: max(1, len(live) // 2**12)]], self._metric)
        queries = _tuning_queries(self._queries, sample, CHECKING_QUERIES)
        base.told, self._asked = self._told(), 0
        everything = select(rows, (), None, None)
        base.tune(queries, keys, self._metric, everything, self.config.recall, self._neighbours)

    def refresh(self, rows: RowTable, keys: Tensor, *, wait: bool) -> None:
        """Take every pending row into the base; with ``wait``, let a build in the background come to its end."""
        if self._is_interrupted:
            return
        with self._changing():
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

    def build(self, rows: RowTable, keys: Tensor) -> None:
        """Build the base anew from the rows as they are."""
        if self._is_interrupted:
            return
        with self._changing():
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
        return EXACT_ROWS if self.config.factory == "auto" else self._rows_to_train

    def _renew(self, rows: RowTable, keys: Tensor, old: _Base | None) -> None:
        """Build a base, with the trained lists of an ``old`` one if there is any, now or aside."""
        if not self.config.background:
            self._install(self._plan(rows, keys, old).carry_out())
        elif self._aside is None:
            self._aside = _Aside(self._plan(rows, keys, old))

    def _plan(self, rows: RowTable, keys: Tensor, old: _Base | None) -> _Plan:
        slots = rows.live_slots()
        vectors = _prepared(keys if len(slots) == len(keys) else keys.index_select(0, slots), self._metric)
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
        return _Plan(
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
            _tuning_queries(self._queries, vectors, TUNING_QUERIES),
            self._metric,
            self.config.recall,
            self._neighbours,
            self._told(),
        )

    def _adopt(self, aside: _Aside) -> None:
        """Change to what was built aside, from rows as they were then."""
        built = aside.result()  # may be interrupted: then it is still under way
        self._aside = None
        if built is not None:
            self._install(built)
            self._version = built.version

    def _install(self, built: _Built) -> None:
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

    def stats(self, rows: RowTable, keys: Tensor) -> IndexStats:
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

    def invariants(self, rows: RowTable) -> Iterator[tuple[str, bool]]:
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


def _truth(
    queries: Tensor, keys: Tensor, metric: str, selection: Selection, k: int
) -> tuple[Scan, Tensor, Tensor, Tensor]:
    """What a recall is measured by.

    How queries meet rows, the queries prepared, the slots of the k best rows of each, (m, k), and from which score on a
    row is as good as these, (m, 1): one that ties with the k-th best is.
    """
    scan = Scan(metric, centre_of(queries, metric), selection, compute_dtype(queries, keys))
    operand = prepare_query(queries, metric, 1.0, scan.centre, scan.dtype)
    scores, best = exact_top_k(operand, keys, scan, k)
    worst = scores[:, -1:]
    return scan, operand, best, worst - 1e-5 * worst.abs()


def _cost(base: _Base, queries: int) -> float:
    """What a search costs beside an exact one."""
    return base.share * VISIT_COST * queries / (queries + FIRST_QUERY_COST)


def _pays(base: _Base, rows: RowTable, selection: Selection, k: int, queries: int) -> bool:
    """Whether a search in the base is cheaper than an exact one of so many queries."""
    few = selection.shared_count <= max(4 * k, FEW * len(rows))
    if queries == 0 or few:
        return False
    more = math.sqrt(max(1.0, k * len(rows) / selection.shared_count / max(1, base.neighbours)))
    return more * _cost(base, queries) <= 1


def _best_of(slots: Tensor, operand: Tensor, keys: Tensor, scan: Scan, k: int) -> Tensor:  # (B, c) -> (B, k)
    """The k best of each query's candidates by their live keys."""
    return slots.gather(-1, top_k(scores_at(operand, keys, slots, scan), k)[1])


def _scale(rows: Tensor) -> float:  # (n, d)
    """What a move of a row is far beside, such that neither outliers nor distances between clusters count."""
    if len(rows) < 2:
        return 0.0
    sample = rows[:: max(1, len(rows) // 2**14)]
    apart = float(_distance(sample, sample.median(dim=0).values).median())
    some = sample[:: max(1, len(sample) // 256)]
    nearest = torch.cdist(some.double(), sample.double()).topk(2, dim=1, largest=False).values[:, 1]
    return min(apart, CLUSTERED * float(nearest.median())) or apart


def _longest(keys: Tensor, selection: Selection) -> Tensor:
    """The slots of the rows whose norm stands out, the longest first."""
    norms = torch.linalg.vector_norm(keys[: selection.size], dim=-1, dtype=torch.float32)
    if selection.shared is not None:
        norms[~selection.shared] = 0.0
        usual = norms[selection.shared][:: max(1, selection.shared_count // 2**14)].median()
    else:
        usual = norms[:: max(1, len(norms) // 2**14)].median()
    norms, slots = norms.topk(int(CROWN_SHARE * selection.shared_count))
    longest: Tensor = slots[norms > CROWN_RATIO * usual]
    return longest


def _tuning_queries(query: Tensor | None, rows: Tensor, count: int) -> list[Tensor]:  # (B, d), (n, d) -> (m, d) each
    """Queries to tune on: those of the read that wants the index, and, where they are few, some rows moved a little."""
    given = rows[:0] if query is None else query.detach().to(rows.dtype)
    given = given[:: max(1, len(given) // count)][:count]
    generator = torch.Generator("cpu").manual_seed(0)
    wanted = count - len(given) if len(rows) else 0
    chosen = torch.randint(max(1, len(rows)), (wanted,), generator=generator, device="cpu")
    sample = rows[chosen.to(rows.device)]
    noise = torch.randn(sample.shape, generator=generator, device="cpu").to(sample)
    spread = sample.std(dim=0, correction=0) if len(sample) else 0.0
    made = sample + noise.mul_(0.5 * spread)
    groups = [given, made] if len(given) >= TELLING_QUERIES else [torch.cat([given, made])]
    return [group for group in groups if len(group)]


# -- FAISS -----------------------------------------------------------------------------------------------


def _faiss_metric(metric: str) -> int:
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def _prepared(keys: Tensor, metric: str) -> Tensor:  # (n, d) -> (n, d) float32
    """``keys`` as FAISS compares them."""
    vectors: Tensor = keys.detach().float()
    if metric == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    return vectors


def _array(rows: Tensor) -> Any:
    """``rows`` as FAISS takes them."""
    return np.ascontiguousarray(rows.cpu().numpy())


def _distance(left: Tensor, right: Tensor) -> Tensor:  # (n, d), (n, d) -> (n,)
    distance: Tensor = torch.linalg.vector_norm(left - right, dim=-1)
    return distance


def _core(index: Any) -> Any:
    """Return the index that finds candidates, within transformations of the rows and refinements of what it finds."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _core(index.index)
    return _core(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _parts(index: Any) -> Iterator[Any]:
    """Yield an index and all within it that may be trained: transformations and other indexes."""
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            yield faiss.downcast_VectorTransform(index.chain.at(place))
    level = getattr(index, "q1", None)  # the lists of an Index2Layer
    if level is not None:
        yield level
    for name in INNER_INDEXES:
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index):
            yield from _parts(inner)


def _quantizers(part: Any) -> Iterator[Any]:
    """Yield what turns vectors to codes in a part of an index, where that is trained by clustering."""
    for name in QUANTIZERS:
        quantizer = getattr(part, name, None)
        if quantizer is not None:
            yield quantizer


def _ivf(index: Any) -> Any:
    """The IVF index within ``index``, or None."""
    return faiss.try_extract_index_ivf(_core(index))


def _accepts(index: Any, selector: Any, width: int | None) -> bool:
    """Whether FAISS searches ``index`` with a selector, or a width: not every kind does, and it says so by raising."""
    parameters = _search_parameters(index, selector, width)
    # FAISS refuses those of additive quantizers, too, but up to 1.10 that ends the process.
    if parameters is None or isinstance(_core(index), faiss.IndexIVFAdditiveQuantizer):
        return False
    try:
        index.search(np.zeros((1, index.d), dtype=np.float32), 1, params=parameters)
    except RuntimeError:
        return False
    return True


def _search_parameters(index: Any, selector: Any, width: int | None) -> Any:
    """Return what FAISS needs to search among selected entries, so widely, at whatever depth of ``index``."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_parameters(index.index, selector, width)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = _search_parameters(index.base_index, selector, width)
        if inner is None:
            return None
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=width or index.nprobe)
    if isinstance(index, faiss.IndexHNSW) and width is not None:
        return faiss.SearchParametersHNSW(efSearch=width)
    return None


def _movable(index: Any) -> Any:
    """The inverted file within ``index`` whose entries can be moved in place, under its own type; else None."""
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
    # Other kinds keep more than lists of codes, or refuse.
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
    return inner if type(inner) in kinds else None


def _within(index: Any, vectors: Any) -> Any:
    """``vectors`` as the inverted file within ``index`` sees them."""
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(place)).apply(vectors)
    return np.ascontiguousarray(vectors)


def _fill(index: Any, vectors: Any, lists: Any) -> None:
    """Add ``vectors`` to a trained index without entries, to the ``lists`` given, or the nearest where that is -1."""
    ivf, inside = _movable(index), _within(index, vectors)
    unknown = lists < 0
    if unknown.any():
        lists[unknown] = ivf.quantizer.search(inside[unknown], 1)[1].ravel()
    ivf.set_direct_map_type(faiss.DirectMap.Array)
    ivf.add_core(len(inside), faiss.swig_ptr(inside), None, faiss.swig_ptr(lists))
    index.ntotal = ivf.ntotal


def _knob(index: Any) -> tuple[Any, str, int]:
    """What trades time for recall: an object, its attribute, and the attribute's largest useful value."""
    core = _core(index)
    if isinstance(core, faiss.IndexIVF):
        return core, "nprobe", core.nlist
    if isinstance(core, faiss.IndexHNSW):
        return core.hnsw, "efSearch", max(core.ntotal, 8)
    return None, "", 0


def _rows_to_train(index: Any) -> int:
    """Return the fewest rows that FAISS can train, or build, an index with."""
    fewest = [1]
    for part in _parts(index):
        if isinstance(part, (faiss.IndexIVF, faiss.Level1Quantizer)):
            if not isinstance(faiss.downcast_index(part.quantizer), faiss.MultiIndexQuantizer):  # it has its own codes
                fewest.append(part.nlist)
        elif isinstance(part, faiss.OPQMatrix):
            fewest.append(2**OPQ_BITS)
        elif isinstance(part, (faiss.PCAMatrix, faiss.ITQTransform)):
            fewest.append(part.d_out)
        elif isinstance(part, faiss.IndexNSG):
            # Where a row has not that many neighbours, FAISS ends the process.
            fewest.append(2 * part.nndescent_L)
        for quantizer in _quantizers(part):
            bits = quantizer.nbits
            fewest.append(2 ** (bits if isinstance(bits, int) else int(faiss.vector_to_array(bits).max())))
    return int(max(fewest))


def _train(index: Any, vectors: Any) -> None:
    """Train an index; FAISS prints no advice about few training rows, and takes no more than it needs."""
    own = []
    for part in _parts(index):
        if isinstance(part, faiss.OPQMatrix):
            own.append((part, faiss.ProductQuantizer(part.d_out, part.M, OPQ_BITS)))
            part.pq = own[-1][1]
        if isinstance(part, (faiss.IndexIVF, faiss.Level1Quantizer)):
            part.cp.min_points_per_centroid = 1
            part.cp.max_points_per_centroid = 64
            part.cp.niter = 10
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # it takes minutes, for a kind of search that is not used here
        for quantizer in _quantizers(part):
            if hasattr(quantizer, "cp"):
                quantizer.cp.min_points_per_centroid = 1
    try:
        index.train(vectors)
    finally:
        for part, _ in own:
            part.pq = None  # it is freed with this call


def _reason(error: Exception) -> str:
    """What a FAISS error says, without the place in FAISS's source."""
    text = " ".join(str(error).split())
    if not isinstance(error, (RuntimeError, AssertionError)):
        return f"{type(error).__name__}: {text}"
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: )?", "", text) or type(error).__name__
