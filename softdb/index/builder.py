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
    find_movable_ivf,
    iterate_parts,
    iterate_quantizers,
    to_array,
    to_faiss_metric,
    to_vectors,
)
from softdb.index.policy import IndexPolicy
from softdb.index.recent_queries import TUNING_QUERIES, RecentQueries
from softdb.index.tuning import tune_base
from softdb.table.storage import RowStorage

__all__ = [
    "MAX_NORM",
    "BuildPlan",
    "BuildResult",
    "count_training_rows",
    "format_faiss_error",
    "plan_build",
    "run_build",
]

# Number of IVF lists of an "auto" index, divided by the square root of the number of rows; FAISS advises 4 to 16.
LISTS_PER_SQRT_ROW = 4

# Rows with at least this norm are left out: FAISS aborts the process if squared norms overflow.
MAX_NORM = 1e18

# Number of bits of the codes for which FAISS trains an OPQ transform.
OPQ_BITS = 8

# Maximum number of training rows for each IVF list, and number of k-means iterations.
MAX_POINTS_PER_CENTROID, TRAINING_ROUNDS = 64, 10


@dataclass
class BuildPlan:
    """Inputs of a build, collected before it, so that rows may change while it runs.

    Attributes:
        version: Version of the rows.
        slots: Slots of the rows, (n,), ascending, on the CPU.
        rows: Vectors that FAISS indexes, (n, d).
        keys: Keys by slot, (capacity, d); None if ``rows`` is a copy.
        left_out: Slots of rows that are left out, since their norm is not finite or is at least `MAX_NORM`.
        capacity: Number of slots.
        factory: FAISS factory string.
        old: Base index whose trained lists are reused, or None to train new ones.
        empty: Empty FAISS index with the lists of ``old``, or None.
        lists: List number of each row in ``empty``, int64; -1 means the nearest list.
        queries: Groups of queries to tune on.
        tuned_queries: Number of recent queries among them.
        neighbors: Number of nearest rows to tune for.
        metric: Metric of the scores.
        recall: Recall target.
        policy: Thresholds of the index.
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
    neighbors: int
    metric: str
    recall: float
    policy: IndexPolicy


@dataclass(frozen=True)
class BuildResult:
    """Result of a build: a base index or an error.

    Attributes:
        version: Version of the rows in the plan.
        base: Base index, or None if the build failed.
        left_out: Slots of rows that are left out, as in `BuildPlan`.
        rows: Number of rows, including the rows that are left out.
        seconds: Duration of the build.
        error: Error message, or None.
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
    """Plan a build from the present rows.

    Args:
        rows: Storage of the rows.
        keys: Keys by slot, (capacity, d).
        queries: Recent queries, on which to tune.
        config: Configuration of the index.
        metric: Metric of the scores.
        policy: Thresholds of the index.
        copied: Whether to copy the keys, because they may move later.
        old: Base index whose trained lists to reuse, or None.
        keep_lists: Whether the visible rows of ``old`` stay in their lists.
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
        is_kept = old.is_visible(cpu_slots) & keep_lists
        lists[is_kept.numpy()] = old.get_lists(old.entry_of[cpu_slots[is_kept]])
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
        neighbors=queries.neighbors,
        metric=metric,
        recall=config.recall,
        policy=policy,
    )


def run_build(plan: BuildPlan) -> BuildResult:
    """Build a base index, or return the error."""
    started = time.perf_counter()
    base, error = None, None
    try:
        with torch.no_grad():
            base = build_base(plan)
    except Exception as failure:  # FAISS errors and lack of memory; reads then use exact search
        error = format_faiss_error(failure)
    rows = len(plan.slots) + len(plan.left_out)
    return BuildResult(plan.version, base, plan.left_out, rows, time.perf_counter() - started, error)


def build_base(plan: BuildPlan) -> Base:
    """Train, fill and tune a base index.

    Raises:
        Exception: FAISS raised an error, or there was not enough memory.
    """
    vectors = to_array(plan.rows)
    index = plan.empty
    if index is None:
        index = faiss.index_factory(vectors.shape[1], plan.factory, to_faiss_metric(plan.metric))
        train_index(index, vectors)
        ivf = find_movable_ivf(index)
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
    has_entry = base.entry_of.to(plan.rows.device) >= 0
    selection = Selection(len(has_entry), shared=None if bool(has_entry.all()) else has_entry)
    base.tuned_queries = plan.tuned_queries
    keys = plan.rows if keys is None else keys
    tune_base(base, plan.queries, keys, plan.metric, selection, plan.recall, plan.neighbors)
    return base


def fill_index(index: Any, vectors: Any, lists: Any) -> None:
    """Add vectors to given lists of a trained index; -1 means the nearest list."""
    ivf, transformed = find_movable_ivf(index), apply_transforms(index, vectors)
    unknown = lists < 0
    if unknown.any():
        lists[unknown] = ivf.quantizer.search(transformed[unknown], 1)[1].ravel()
    ivf.set_direct_map_type(faiss.DirectMap.Array)
    ivf.add_core(len(transformed), faiss.swig_ptr(transformed), None, faiss.swig_ptr(lists))
    index.ntotal = ivf.ntotal


def count_training_rows(index: Any) -> int:
    """Return the minimum number of rows with which FAISS can build an index."""
    minimums = [1]
    for part in iterate_parts(index):
        if isinstance(part, (faiss.IndexIVF, faiss.Level1Quantizer)):
            # A multi-index is trained by clustering its codes.
            if not isinstance(faiss.downcast_index(part.quantizer), faiss.MultiIndexQuantizer):
                minimums.append(part.nlist)
        elif isinstance(part, faiss.OPQMatrix):
            minimums.append(2**OPQ_BITS)
        elif isinstance(part, (faiss.PCAMatrix, faiss.ITQTransform)):
            minimums.append(part.d_out)
        elif isinstance(part, faiss.IndexNSG):
            # FAISS aborts the process if rows have fewer neighbors.
            minimums.append(2 * part.nndescent_L)
        for quantizer in iterate_quantizers(part):
            bits = quantizer.nbits
            minimums.append(2 ** (bits if isinstance(bits, int) else int(faiss.vector_to_array(bits).max())))
    return int(max(minimums))


def train_index(index: Any, vectors: Any) -> None:
    """Train an index on a sample of the rows; FAISS prints no warnings."""
    quantizers = []
    for part in iterate_parts(index):
        if isinstance(part, faiss.OPQMatrix):
            quantizers.append((part, faiss.ProductQuantizer(part.d_out, part.M, OPQ_BITS)))
            part.pq = quantizers[-1][1]
        if isinstance(part, (faiss.IndexIVF, faiss.Level1Quantizer)):
            part.cp.min_points_per_centroid = 1
            part.cp.max_points_per_centroid = MAX_POINTS_PER_CENTROID
            part.cp.niter = TRAINING_ROUNDS
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # takes minutes, and only a search that softdb does not use needs it
        for quantizer in iterate_quantizers(part):
            if hasattr(quantizer, "cp"):
                quantizer.cp.min_points_per_centroid = 1
    try:
        index.train(vectors)
    finally:
        for part, _ in quantizers:
            part.pq = None  # the quantizer is freed when this function returns


def format_faiss_error(error: Exception) -> str:
    """Format a FAISS error without its position in FAISS's source."""
    text = " ".join(str(error).split())
    if not isinstance(error, (RuntimeError, AssertionError)):
        return f"{type(error).__name__}: {text}"
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: )?", "", text) or type(error).__name__
