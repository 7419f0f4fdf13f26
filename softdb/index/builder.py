"""Build a base index: plan, train, fill and tune it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import faiss

from softdb.filters import Selection
from softdb.index.base import Base
from softdb.index.config import IndexConfig
from softdb.index.faiss_parts import (
    apply_transforms,
    faiss_metric,
    movable_ivf_of,
    parts_of,
    quantizers_of,
    to_array,
    to_vectors,
)
from softdb.index.policy import IndexPolicy
from softdb.index.recent_queries import TUNING_QUERIES, RecentQueries
from softdb.index.tuning import tune_base
from softdb.table.storage import RowStorage

__all__ = ["MAX_NORM", "BuildPlan", "BuildResult", "plan_build", "reason_of", "rows_to_train", "run_build"]

# IVF lists of an "auto" index, for each square root of a row: FAISS advises 4 to 16.
LISTS_PER_SQRT_ROW = 4

# FAISS aborts the process where squared norms overflow: rows this long are left out.
MAX_NORM = 1e18

# Bits of the codes that FAISS trains an OPQ transformation for.
OPQ_BITS = 8

# Training rows for each IVF list at the most, and rounds of k-means.
MAX_POINTS_PER_CENTROID, TRAINING_ROUNDS = 64, 10


@dataclass
class BuildPlan:
    """Hold everything that a build needs, so that rows may change meanwhile.

    Attributes:
        version: The version of the rows.
        slots: (n,) ascending, on the CPU.
        rows: (n, d), the vectors as FAISS takes them.
        keys: (capacity, d); None if ``rows`` are a copy of their own.
        left_out: The slots of rows that are not finite.
        capacity: The number of slots.
        factory: FAISS's factory string.
        old: The base whose trained lists are used again, or None to train new ones.
        empty: An empty index with those lists.
        lists: Which of them each row is in, int64, -1 where that is to be found.
        queries: Groups of queries to tune on.
        tuned_queries: The number of recent queries among them.
        neighbours: The number of nearest rows to tune for.
        metric: How keys are scored.
        recall: The recall target.
        policy: The thresholds of the base.
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
    tuned_queries: int
    neighbours: int
    metric: str
    recall: float
    policy: IndexPolicy


@dataclass(frozen=True)
class BuildResult:
    """Hold the outcome of a build: a base, or the error that prevented it.

    Attributes:
        version: The version of the rows that the plan was made from.
        base: The base, or None.
        left_out: The slots of rows that are not finite.
        rows: The number of rows, with those left out.
        seconds: The time that it took.
        error: The error, or None.
    """

    version: int
    base: Base | None
    left_out: Tensor
    rows: int
    seconds: float
    error: str | None


def plan_build(
    rows: RowStorage,
    keys: Tensor,
    queries: RecentQueries,
    config: IndexConfig,
    metric: str,
    policy: IndexPolicy,
    *,
    copied: bool,
    old: Base | None,
    keep_lists: bool,
) -> BuildPlan:
    """Plan a build from the rows as they are.

    Args:
        rows: Which slots hold rows.
        keys: (capacity, d).
        queries: Recent queries, to tune on.
        config: The index to build.
        metric: How keys are scored.
        policy: The thresholds of the base.
        copied: Whether keys may move later on, so that the base needs a copy.
        old: A base whose trained lists to use again, or None.
        keep_lists: Whether its visible rows are still in the lists where they belong.
    """
    slots = rows.live_slots()
    vectors = to_vectors(keys if len(slots) == len(keys) else keys.index_select(0, slots), metric)
    left_out = slots[:0]
    finite = torch.linalg.vector_norm(vectors, dim=-1) < MAX_NORM
    if not bool(finite.all()):
        slots, left_out, vectors = slots[finite], slots[~finite], vectors[finite]
    if copied and vectors.data_ptr() == keys.data_ptr():
        vectors = vectors.clone()
    cpu_slots = slots.cpu()
    factory = config.factory
    if factory == "auto":
        factory = f"IVF{2 ** round(np.log2(LISTS_PER_SQRT_ROW * np.sqrt(max(1, len(slots)))))},Flat"
    empty = lists = None
    if old is not None and old.lists:
        factory, empty = old.factory, faiss.clone_index(old.owner)
        empty.reset()
        lists = np.full(len(cpu_slots), -1, dtype=np.int64)
        known = old.is_visible(cpu_slots) & keep_lists
        lists[known.numpy()] = old.lists_of(old.entry_of[cpu_slots[known]])
    return BuildPlan(
        version=rows.version,
        slots=cpu_slots,
        rows=vectors,
        keys=None if copied else keys,
        left_out=left_out,
        capacity=rows.capacity,
        factory=factory,
        old=None if empty is None else old,
        empty=empty,
        lists=lists,
        queries=queries.make_tuning_groups(vectors, TUNING_QUERIES),
        tuned_queries=queries.usable_count,
        neighbours=queries.neighbours,
        metric=metric,
        recall=config.recall,
        policy=policy,
    )


def run_build(plan: BuildPlan) -> BuildResult:
    """Build a base, or report the error that prevents it."""
    started = time.perf_counter()
    base, error = None, None
    try:
        with torch.no_grad():
            base = build_base(plan)
    except Exception as failure:  # any error of FAISS, and lack of memory: top-k reads fall back to exact search
        error = reason_of(failure)
    rows = len(plan.slots) + len(plan.left_out)
    return BuildResult(plan.version, base, plan.left_out, rows, time.perf_counter() - started, error)


def build_base(plan: BuildPlan) -> Base:
    """Train, fill and tune a base.

    Raises:
        Exception: Whatever FAISS raises.
    """
    vectors = to_array(plan.rows)
    index = plan.empty
    if index is None:
        index = faiss.index_factory(vectors.shape[1], plan.factory, faiss_metric(plan.metric))
        train_index(index, vectors)
        ivf = movable_ivf_of(index)
        if ivf is not None:
            ivf.set_direct_map_type(faiss.DirectMap.Array)
        index.add(vectors)
    else:
        fill_index(index, vectors, plan.lists)
    copied = plan.keys is None
    base = Base(index, plan.factory, plan.slots, plan.rows, plan.capacity, copied=copied, policy=plan.policy)
    if plan.old is not None:
        base.inherit_lists(plan.old)
    keys = plan.keys if base.movement.copy is None else base.movement.copy
    held = base.entry_of.to(plan.rows.device) >= 0
    everything = Selection(len(held), shared=None if bool(held.all()) else held)
    base.tuned_queries = plan.tuned_queries
    keys = plan.rows if keys is None else keys
    tune_base(base, plan.queries, keys, plan.metric, everything, plan.recall, plan.neighbours)
    return base


def fill_index(index: Any, vectors: Any, lists: Any) -> None:
    """Add vectors to the given lists of a trained index; -1 is the nearest list."""
    ivf, inside = movable_ivf_of(index), apply_transforms(index, vectors)
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
            # FAISS ends the process where a row has fewer neighbours.
            fewest.append(2 * part.nndescent_L)
        for quantizer in quantizers_of(part):
            bits = quantizer.nbits
            fewest.append(2 ** (bits if isinstance(bits, int) else int(faiss.vector_to_array(bits).max())))
    return int(max(fewest))


def train_index(index: Any, vectors: Any) -> None:
    """Train an index, without FAISS's printed advice, on no more rows than it needs."""
    own = []
    for part in parts_of(index):
        if isinstance(part, faiss.OPQMatrix):
            own.append((part, faiss.ProductQuantizer(part.d_out, part.M, OPQ_BITS)))
            part.pq = own[-1][1]
        if isinstance(part, (faiss.IndexIVF, faiss.Level1Quantizer)):
            part.cp.min_points_per_centroid = 1
            part.cp.max_points_per_centroid = MAX_POINTS_PER_CENTROID
            part.cp.niter = TRAINING_ROUNDS
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # It takes minutes, for a kind of search that is not used here.
        for quantizer in quantizers_of(part):
            if hasattr(quantizer, "cp"):
                quantizer.cp.min_points_per_centroid = 1
    try:
        index.train(vectors)
    finally:
        for part, _ in own:
            part.pq = None  # it is freed with this call


def reason_of(error: Exception) -> str:
    """Return the message of a FAISS error without its position in FAISS's source."""
    text = " ".join(str(error).split())
    if not isinstance(error, (RuntimeError, AssertionError)):
        return f"{type(error).__name__}: {text}"
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: )?", "", text) or type(error).__name__
