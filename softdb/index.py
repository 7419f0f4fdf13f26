"""Candidates for a top-k read: which rows are worth scoring.

The index answers with slots, never with scores: what a read returns is computed from the live rows, so a FAISS index
that is approximate or behind can miss a row but not report a wrong one. It is kept from falling behind as a
log-structured store does it: a FAISS *base* built from the rows as they were; a bitmap of base entries that are
stale, since their row was changed or deleted; and the *pending* rows, changed since, which every search goes through
exactly. Enough pending rows are appended to the base as new entries; when half of the entries are stale, or the rows
have outgrown the lists they were sorted into, the base is built anew.

The index changes only when rows have changed, at the first search or refresh after it: between two writes every
search sees the same one.

This is the only module that imports faiss.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import faiss  # after torch: so that both share one OpenMP runtime

from softdb.blockwise import Scan, exact_top_k, scores_at, top_k
from softdb.errors import ArgumentError, DtypeError, describe
from softdb.filters import select
from softdb.rows import RowTable
from softdb.scores import centre_of, compute_dtype, prepare_query

__all__ = ["Index", "IndexConfig", "IndexStats"]


def _one_thread() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


# A child forked after a parallel search hangs in its first parallel region, torch's or FAISS's (faiss issue 5206):
# the OpenMP runtime waits for threads that fork() did not copy.
os.register_at_fork(after_in_child=_one_thread)

# Where an IVF search that finds 95 % gets faster than an exact one: measured from 200,000 rows on for single queries
# and by a million for 256 at a time (benchmarks/index_crossover.py).
EXACT_ROWS = 500_000
# A filter that leaves at most this fraction of the rows leaves so few that an exact top-k over them is cheaper.
FEW = 1 / 32
# Pending rows are appended to the base when they pass this many, and this fraction of it.
PENDING_ROWS, PENDING_SHARE = 4096, 1 / 64
# An IVF base is built anew when it holds this many times the rows that its lists were trained for.
OUTGROWN = 4
# Queries, and neighbours of each, that the probes are tuned on.
TUNING_QUERIES, TUNING_NEIGHBOURS = 256, 32


@dataclass(frozen=True)
class IndexConfig:
    """How a store finds the candidates of a top-k read.

    Args:
        factory: "auto" (exact below a measured number of rows, FAISS IVF above), "Flat" (softdb's own exact top-k;
            no FAISS object is built), or a FAISS factory string such as "IVF1024,Flat" or "HNSW32".
        recall: The fraction of the true k best rows that the search is to find. IVF probes and HNSW's efSearch are
            raised, when the index is built, until a sample of queries finds as many.
    """

    factory: str = "auto"
    recall: float = field(default=0.95, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str):
            raise DtypeError(
                f"factory: expected 'auto', 'Flat' or a FAISS factory string, got {describe(self.factory)}"
            )
        if isinstance(self.recall, bool) or not isinstance(self.recall, (int, float)):
            raise DtypeError(f"recall: expected a number, got {describe(self.recall)}")
        if not 0 < self.recall <= 1:
            raise ArgumentError(f"recall: expected a number above 0 and at most 1, got {self.recall}")


@dataclass(frozen=True)
class IndexStats:
    """What the index is and what it has cost.

    Attributes:
        rows: Rows in the store.
        pending: Rows that searches go through exactly because the base does not hold them as they are.
        factory: The FAISS factory string of the base; "Flat" where searches are exact.
        nprobe: IVF lists visited per query; None for other indexes.
        recall: Measured on a sample of queries when the base was built; 1.0 where searches are exact.
        builds: How often a base has been built.
        search_seconds, upkeep_seconds, rebuild_seconds: Time spent so far in searching, in noting changes and
            appending, and in building.
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


@dataclass
class _Base:
    """A FAISS index over rows as they once were.

    Entry e of the index is the row that was in slot ``slots[e]``; it is stale unless ``entry_of[slots[e]] == e``.
    """

    owner: Any  # the FAISS index: what FAISS gives as its parts or other types dies with it
    factory: str
    trained_rows: int
    slots: Tensor  # (entries,) on the CPU
    entry_of: Tensor  # (capacity,) on the CPU: the entry of a slot, -1 where there is none
    in_order: bool  # whether entry e is slot e
    stale: int = 0
    recall: float | None = None
    bitmap: Any = None  # of the entries that are not stale, while there are others

    @property
    def index(self) -> Any:
        """The FAISS index under its own type."""
        return faiss.downcast_index(self.owner)

    @property
    def entries(self) -> int:
        return len(self.slots)


class Index:
    """Finds candidate slots for queries, whatever happened to the rows since the last search.

    Args:
        config: What index to keep.
        metric: How rows are scored.
        key_dim: Width of the keys.

    Raises:
        ArgumentError: FAISS does not know the factory string.
    """

    def __init__(self, config: IndexConfig, metric: str, key_dim: int) -> None:
        self.config = config
        self._metric = metric
        self._faiss_metric = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        if config.factory not in ("auto", "Flat"):
            try:
                faiss.index_factory(key_dim, config.factory, self._faiss_metric)
            except RuntimeError as error:
                raise ArgumentError(
                    f"index: expected 'auto', 'Flat' or a FAISS factory string for width {key_dim}, "
                    f"got {config.factory!r}, which FAISS refuses: {_reason(error)}"
                ) from error
        self._builds = 0
        self._search_seconds = self._upkeep_seconds = self._rebuild_seconds = 0.0
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget the base: rows were loaded or converted."""
        self._base: _Base | None = None
        self._pending: Tensor = torch.empty(0, dtype=torch.int64, device="cpu")
        self._version = -1
        self._settled = True  # False while an optimiser moves the rows and no base could follow
        self._failed_at = 0  # how many rows there were when a build failed
        self._error: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"], state["_base"]  # a copy builds its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self.reset()

    # -- searching -------------------------------------------------------------------------------------------

    def search(
        self,
        query: Tensor,  # (B, d)
        operand: Tensor,  # (B, w): the same, prepared
        keys: Tensor,  # (capacity, d)
        rows: RowTable,
        scan: Scan,
        k: int,
    ) -> Tensor:  # (B, k)
        """The slots of the k best rows of each query, as far as the index finds them; -1 where fewer may be seen."""
        query, operand, keys = query.detach(), operand.detach(), keys.detach()
        selection = scan.selection
        with self._lock, torch.inference_mode(False):
            self._follow(rows, keys, query)
            base, pending = self._base, self._pending
        started = time.perf_counter()
        try:
            few = selection.shared_count <= max(4 * k, FEW * len(rows))
            if base is None or few or len(query) == 0:
                return exact_top_k(operand, keys, scan, k)[1]
            found = self._search_base(base, query, rows, scan, k)  # (B, c)
            if len(pending):
                visible = Scan(scan.metric, scan.centre, selection.among(pending), scan.dtype)
                found = torch.cat([found, exact_top_k(operand, keys, visible, k)[1]], dim=-1)
            if found.shape[-1] > k:
                found = _best_of(found, operand, keys, scan, k)
            missing = found < 0
            if bool(missing.any()):
                short = ((~missing).sum(-1) < k).nonzero().squeeze(-1)
                rest = Scan(scan.metric, scan.centre, selection.take(short), scan.dtype)
                found[short] = exact_top_k(operand[short], keys, rest, k)[1]
            return found
        finally:
            self._search_seconds += time.perf_counter() - started

    def _search_base(self, base: _Base, query: Tensor, rows: RowTable, scan: Scan, k: int) -> Tensor:
        selection = scan.selection
        wanted = k
        if selection.excluded is not None:
            wanted += selection.excluded.shape[-1]
        if selection.rule is not None:
            wanted *= 4
        selectable = isinstance(base.index, faiss.IndexIVF)
        selector = None
        filtered = None if selection.shared is rows.live() else selection.shared
        if selectable and filtered is not None:
            selector = _selector(filtered.cpu()[base.slots] & self._current(base))
        elif selectable and base.stale:
            if base.bitmap is None:
                base.bitmap = _selector(self._current(base))
            selector = base.bitmap
        elif not selectable and (base.stale or filtered is not None):
            wanted *= 2
        entries = torch.from_numpy(
            _search(base.index, _vectors(query, self._metric), min(wanted, base.entries), selector)
        )
        slots = entries
        if base.stale or not base.in_order:
            slots = base.slots[entries.clamp(min=0)]
            slots[(entries < 0) | (base.entry_of[slots] != entries)] = -1
        slots = slots.to(query.device)
        if selection.shared is None and selection.is_shared:
            return slots
        return slots.masked_fill_(~selection.allows(slots), -1)

    @staticmethod
    def _current(base: _Base) -> Tensor:
        """Which entries are not stale."""
        return base.entry_of[base.slots] == torch.arange(base.entries, device="cpu")

    # -- following the rows ----------------------------------------------------------------------------------

    def _follow(self, rows: RowTable, keys: Tensor, query: Tensor | None = None) -> None:
        """Take note of every change since the last call."""
        if rows.version == self._version:
            return
        started = time.perf_counter()
        if self._base is not None:
            if rows.keys_moved_at > self._version:
                # An optimiser moved rows, any of them: until the index is built again, searches are exact.
                self._base, self._settled = None, False
            else:
                self._note_changes(self._base, rows)
        self._version = rows.version
        self._upkeep_seconds += time.perf_counter() - started
        if self._wants_base(rows):
            self._build(rows, keys, query)
        elif self._base is None:
            self._pending = torch.empty(0, dtype=torch.int64, device="cpu")
        elif len(self._pending) > max(PENDING_ROWS, PENDING_SHARE * self._base.entries):
            self._append(self._base, rows, keys)

    def _note_changes(self, base: _Base, rows: RowTable) -> None:
        changed = rows.changed_since(self._version, keys=True)
        if len(changed) == 0:
            return
        here = changed.cpu()
        if rows.capacity > len(base.entry_of):
            grown = torch.full((rows.capacity,), -1, dtype=torch.int64, device="cpu")
            grown[: len(base.entry_of)] = base.entry_of
            base.entry_of = grown
        base.stale += int((base.entry_of[here] >= 0).sum())
        base.entry_of[here] = -1
        base.bitmap = None
        self._pending = self._pending_with(changed, rows)

    def _pending_with(self, changed: Tensor, rows: RowTable) -> Tensor:
        """The pending slots once ``changed`` ones are, too; a slot without a row is not."""
        pending: Tensor = torch.cat([self._pending.to(changed.device), changed]).unique()
        return pending[rows.ids[pending] >= 0]

    def _wants_base(self, rows: RowTable) -> bool:
        if self.config.factory == "Flat" or not self._settled:
            return False
        enough = max(2 * self._failed_at, _rows_to_train(self.config.factory))
        if self._base is None:
            return len(rows) >= enough
        outgrown = _ivf(self._base.index) is not None and len(rows) > OUTGROWN * self._base.trained_rows
        worn = 2 * self._base.stale > self._base.entries or outgrown
        # Well below the number that it was built for, so that a row more or less does not build it again and again.
        if 2 * len(rows) < enough or (worn and len(rows) < enough):
            self._base = None
        return worn and self._base is not None

    def refresh(self, rows: RowTable, keys: Tensor) -> None:
        """Take every pending row into the base."""
        with self._lock, torch.inference_mode(False):
            self._settled = True
            self._follow(rows, keys)
            if self._base is None and self._wants_base(rows):
                self._build(rows, keys)
            if self._base is not None and len(self._pending):
                self._append(self._base, rows, keys)

    def build(self, rows: RowTable, keys: Tensor) -> None:
        """Build the base anew from the rows as they are."""
        with self._lock, torch.inference_mode(False):
            self._settled = True
            self._base = None
            self._failed_at = 0
            self._version = rows.version
            if self._wants_base(rows):
                self._build(rows, keys)

    # -- building --------------------------------------------------------------------------------------------

    def _build(self, rows: RowTable, keys: Tensor, query: Tensor | None = None) -> None:
        started = time.perf_counter()
        slots = rows.live_slots()
        factory = self.config.factory
        if factory == "auto":
            factory = f"IVF{2 ** round(np.log2(2 * np.sqrt(len(slots))))},Flat"
        self._base, self._error = None, None
        try:
            vectors = _vectors(keys if len(slots) == len(keys) else keys[slots], self._metric)
            index = faiss.index_factory(keys.shape[-1], factory, self._faiss_metric)
            _quieten(index)
            index.train(vectors)
            index.add(vectors)
            here = slots.cpu()
            entry_of = torch.full((rows.capacity,), -1, dtype=torch.int64, device="cpu")
            entry_of[here] = torch.arange(len(here), device="cpu")
            in_order = int(here[-1]) == len(here) - 1  # since they ascend
            base = _Base(index, factory, len(here), here, entry_of, in_order)
            base.recall = self._tune(base, rows, keys, query)
        except (RuntimeError, AssertionError) as error:  # FAISS's own
            self._error, self._failed_at = _reason(error), len(slots)
        else:
            self._base = base
            self._builds += 1
        self._pending = torch.empty(0, dtype=torch.int64, device="cpu")
        self._rebuild_seconds += time.perf_counter() - started

    def _append(self, base: _Base, rows: RowTable, keys: Tensor) -> None:
        started = time.perf_counter()
        try:
            base.owner.add(_vectors(keys[self._pending], self._metric))
        except RuntimeError:  # some indexes can only be built at once
            self._build(rows, keys)
            return
        here = self._pending.cpu()
        base.entry_of[here] = torch.arange(base.entries, base.entries + len(here), device="cpu")
        base.in_order &= int(here[0]) == base.entries and int(here[-1]) == base.entries + len(here) - 1
        base.slots = torch.cat([base.slots, here])
        base.bitmap = None
        self._pending = torch.empty(0, dtype=torch.int64, device="cpu")
        self._upkeep_seconds += time.perf_counter() - started

    def _tune(self, base: _Base, rows: RowTable, keys: Tensor, query: Tensor | None) -> float:
        """Raise the probes until a sample of queries finds the wanted recall; the recall reached."""
        query = _tuning_queries(keys, base.slots, query)
        k = min(TUNING_NEIGHBOURS, base.entries)
        scan = Scan(
            self._metric,
            centre_of(query, self._metric),
            select(rows, (len(query),), None, None),
            compute_dtype(query, keys),
        )
        operand = prepare_query(query, self._metric, 1.0, scan.centre, scan.dtype)
        worst = exact_top_k(operand, keys, scan, k)[0][:, -1:]
        vectors = _vectors(query, self._metric)

        def measure() -> float:
            entries = torch.from_numpy(_search(base.index, vectors, k, None))
            slots = base.slots[entries.clamp(min=0)].to(keys.device)
            found = scores_at(operand, keys, slots, scan)
            # A row that ties with the k-th best is as good.
            slack = 1e-5 * worst.abs()
            hits = (found >= worst - slack) & (entries.to(keys.device) >= 0)
            return float(hits.sum() / hits.numel())

        knob, name, limit = _knob(base.index)
        if knob is None:
            return measure()
        setattr(knob, name, min(8, limit))
        while (recall := measure()) < self.config.recall and getattr(knob, name) < limit:
            setattr(knob, name, min(2 * getattr(knob, name), limit))
        return recall

    def stats(self, rows: RowTable) -> IndexStats:
        """What the index is and what it has cost."""
        base = self._base
        ivf = None if base is None else _ivf(base.index)
        return IndexStats(
            rows=len(rows),
            pending=0 if base is None else len(self._pending_with(rows.changed_since(self._version, keys=True), rows)),
            factory="Flat" if base is None else base.factory,
            nprobe=None if ivf is None else ivf.nprobe,
            recall=1.0 if base is None else base.recall,
            builds=self._builds,
            search_seconds=self._search_seconds,
            upkeep_seconds=self._upkeep_seconds,
            rebuild_seconds=self._rebuild_seconds,
            error=self._error,
        )


def _best_of(slots: Tensor, operand: Tensor, keys: Tensor, scan: Scan, k: int) -> Tensor:  # (B, c) -> (B, k)
    """The k best of each query's candidates by their live keys."""
    return slots.gather(-1, top_k(scores_at(operand, keys, slots, scan), k)[1])


# -- FAISS -----------------------------------------------------------------------------------------------


def _vectors(keys: Tensor, metric: str) -> Any:  # (N, d) -> float32 array
    """``keys`` as FAISS takes them."""
    vectors = keys.detach().float()
    if metric == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    return np.ascontiguousarray(vectors.cpu().numpy())


def _search(index: Any, vectors: Any, k: int, selector: Any) -> Any:  # -> (B, k) int64 array
    parameters = None
    if selector is not None:
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    return index.search(vectors, k, params=parameters)[1]


def _selector(entries: Tensor) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(entries.numpy(), bitorder="little"))


def _ivf(index: Any) -> Any:
    """The IVF index within ``index``, or None."""
    return faiss.try_extract_index_ivf(index)


def _knob(index: Any) -> tuple[Any, str, int]:
    """What trades time for recall: an object, its attribute, and the attribute's largest useful value."""
    ivf = _ivf(index)
    if ivf is not None:
        return ivf, "nprobe", ivf.nlist
    if isinstance(index, faiss.IndexHNSW):
        return index.hnsw, "efSearch", max(index.ntotal, 8)
    return None, "", 0


def _rows_to_train(factory: str) -> int:
    """How many rows an index of this kind needs at the least."""
    if factory == "auto":
        return EXACT_ROWS
    lists = [
        int(part[3:].split("(")[0].split("_")[0])
        for part in factory.split(",")
        if part[:3] == "IVF" and part[3:4].isdigit()
    ]
    return max([1, *lists])


def _quieten(index: Any) -> None:
    """Keep FAISS from printing advice about few training rows, and from training on more than it needs."""
    ivf = _ivf(index)
    if ivf is not None:
        ivf.cp.min_points_per_centroid = 1
        ivf.cp.max_points_per_centroid = 64
        ivf.cp.niter = 10
    for part in (index, ivf):
        quantiser = None if part is None else getattr(faiss.downcast_index(part), "pq", None)
        if quantiser is not None:
            quantiser.cp.min_points_per_centroid = 1


def _reason(error: Exception) -> str:
    """What a FAISS error says, without the place in FAISS's source."""
    text = " ".join(str(error).split())
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: )?", "", text) or type(error).__name__


def _tuning_queries(keys: Tensor, slots: Tensor, query: Tensor | None) -> Tensor:  # -> (TUNING_QUERIES, d)
    """Queries to tune on: those of the read that wants the index, filled up with some rows' keys moved a little."""
    given = keys[:0].float() if query is None else query.to(compute_dtype(query))
    given = given[:: max(1, len(given) // TUNING_QUERIES)][:TUNING_QUERIES]
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = torch.randint(len(slots), (TUNING_QUERIES - len(given),), generator=generator, device="cpu")
    sample = keys[slots[chosen].to(keys.device)].to(given.dtype)
    noise = torch.randn(sample.shape, generator=generator, device="cpu").to(sample)
    spread = sample.std(dim=0, correction=0) if len(sample) else 0.0
    return torch.cat([given, sample + 0.5 * spread * noise])
