"""Build a base index, here or in a thread of its own."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import faiss

from softdb.filters import Selection
from softdb.index.base import Base
from softdb.index.faiss_parts import array_of, faiss_metric, is_movable, parts_of, quantizers_of, within_lists
from softdb.index.policy import IndexPolicy

# FAISS trains an OPQ transformation for codes of so many bits.
OPQ_BITS = 8


@dataclass
class Plan:
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
        policy: Of the base.
    """

    version: int
    slots: Tensor
    rows: Tensor
    keys: Tensor | None
    left_out: Tensor
    capacity: int
    factory: str
    old: Base | None
    empty: Any
    lists: Any
    queries: list[Tensor]
    metric: str
    recall: float
    neighbours: int
    told: int
    policy: IndexPolicy

    def carry_out(self) -> Built:
        """Build."""
        started = time.perf_counter()
        base, error = None, None
        try:
            with torch.no_grad():
                base = self._base()
        except Exception as failure:  # whatever FAISS raises, and no memory left: there are exact searches
            error = reason_of(failure)
        rows = len(self.slots) + len(self.left_out)
        return Built(self.version, base, self.left_out, rows, time.perf_counter() - started, error)

    def _base(self) -> Base:
        vectors = array_of(self.rows)
        index = self.empty
        if index is None:
            index = faiss.index_factory(vectors.shape[1], self.factory, faiss_metric(self.metric))
            train_index(index, vectors)
            ivf = is_movable(index)
            if ivf is not None:
                ivf.set_direct_map_type(faiss.DirectMap.Array)
            index.add(vectors)
        else:
            fill_index(index, vectors, self.lists)
        base = Base(
            index, self.factory, self.slots, self.rows, self.capacity, copied=self.keys is None, policy=self.policy
        )
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
class Built:
    """What came of a plan: a base, or the reason why there is none."""

    version: int
    base: Base | None
    left_out: Tensor
    rows: int
    seconds: float
    error: str | None


class Background:
    """A build in a thread of its own."""

    def __init__(self, plan: Plan) -> None:
        self._built: Built | None = None
        self._thread = threading.Thread(target=self._run, args=(plan,), name="softdb index build")
        self._thread.start()

    def _run(self, plan: Plan) -> None:
        self._built = plan.carry_out()

    @property
    def is_done(self) -> bool:
        """Whether `result` does not wait."""
        return not self._thread.is_alive()

    def result(self) -> Built | None:
        """What came of it, once it is done; None if it broke off."""
        self._thread.join()
        return self._built


def fill_index(index: Any, vectors: Any, lists: Any) -> None:
    """Add ``vectors`` to a trained index without entries, to the ``lists`` given, or the nearest where that is -1."""
    ivf, inside = is_movable(index), within_lists(index, vectors)
    unknown = lists < 0
    if unknown.any():
        lists[unknown] = ivf.quantizer.search(inside[unknown], 1)[1].ravel()
    ivf.set_direct_map_type(faiss.DirectMap.Array)
    ivf.add_core(len(inside), faiss.swig_ptr(inside), None, faiss.swig_ptr(lists))
    index.ntotal = ivf.ntotal


def rows_to_train(index: Any) -> int:
    """Return the fewest rows that FAISS can train, or build, an index with."""
    fewest = [1]
    for part in parts_of(index):
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
        for quantizer in quantizers_of(part):
            bits = quantizer.nbits
            fewest.append(2 ** (bits if isinstance(bits, int) else int(faiss.vector_to_array(bits).max())))
    return int(max(fewest))


def train_index(index: Any, vectors: Any) -> None:
    """Train an index; FAISS prints no advice about few training rows, and takes no more than it needs."""
    own = []
    for part in parts_of(index):
        if isinstance(part, faiss.OPQMatrix):
            own.append((part, faiss.ProductQuantizer(part.d_out, part.M, OPQ_BITS)))
            part.pq = own[-1][1]
        if isinstance(part, (faiss.IndexIVF, faiss.Level1Quantizer)):
            part.cp.min_points_per_centroid = 1
            part.cp.max_points_per_centroid = 64
            part.cp.niter = 10
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # it takes minutes, for a kind of search that is not used here
        for quantizer in quantizers_of(part):
            if hasattr(quantizer, "cp"):
                quantizer.cp.min_points_per_centroid = 1
    try:
        index.train(vectors)
    finally:
        for part, _ in own:
            part.pq = None  # it is freed with this call


def reason_of(error: Exception) -> str:
    """What a FAISS error says, without the place in FAISS's source."""
    text = " ".join(str(error).split())
    if not isinstance(error, (RuntimeError, AssertionError)):
        return f"{type(error).__name__}: {text}"
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: )?", "", text) or type(error).__name__
