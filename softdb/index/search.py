"""Find candidates in the base index, and in rows that are searched exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from softdb.index.base import Base
from softdb.index.faiss_parts import to_array, to_vectors
from softdb.kernels.backend import backend_for
from softdb.kernels.blocks.topk import top_k
from softdb.kernels.spec import ReadSpec
from softdb.table.storage import RowStorage

__all__ = ["Candidates", "SearchTask", "complete_candidates", "find_candidates", "search_exactly"]

# Factor for the number of candidates of a search with a rule as filter, which allows an unknown fraction of the rows.
RULE_CANDIDATES_FACTOR = 4


class Candidates(NamedTuple):
    """Candidates of a search.

    Attributes:
        slots: Slots of the candidates, (B, k); -1 where a query may see fewer than k rows.
        exact: Whether the candidates are guaranteed to be the k best rows.
        recall: Expected fraction of the k best rows among the candidates.
    """

    slots: Tensor
    exact: bool
    recall: float


class SearchTask(NamedTuple):
    """Queries of a search, and the rows to search.

    Attributes:
        query: Queries, (B, d).
        operand: Queries prepared for the metric, (B, w).
        keys: Keys by slot, (capacity, d).
        rows: Storage of the rows.
        spec: Metric and filters.
        k: Number of candidates for each query.
    """

    query: Tensor
    operand: Tensor
    keys: Tensor
    rows: RowStorage
    spec: ReadSpec
    k: int


def search_exactly(task: SearchTask) -> Tensor:  # -> (B, k)
    """Find the k best rows by exact search."""
    return backend_for(task.operand).exact_top_k(task.operand, task.keys, task.spec, task.k)[1]


def find_candidates(  # (m,) -> (B, up to k)
    task: SearchTask, base: Base, exact_slots: Tensor, search_width: int | None
) -> Tensor:
    """Find the best rows of the base index and of ``exact_slots``.

    The rows at ``exact_slots`` are searched exactly.
    """
    spec, k = task.spec, task.k
    found = _search_base(task, base, search_width)  # (B, c)
    if len(exact_slots):
        visible = replace(
            spec, selection=spec.selection.restrict_to(exact_slots), max_key_norm=None, bf16_matmul=False, noise=None
        )
        found = torch.cat([found, search_exactly(task._replace(spec=visible))], dim=-1)
    if found.shape[-1] <= k:
        return found
    scores = backend_for(task.operand).score_at(task.operand, task.keys, found, spec)
    return found.gather(-1, top_k(scores, k)[1])


def complete_candidates(task: SearchTask, found: Tensor) -> Tensor:  # (B, k)
    """Search exactly for queries with fewer than k candidates.

    The result is written to ``found``.
    """
    missing = found < 0
    if bool(missing.any()):
        short = ((~missing).sum(-1) < task.k).nonzero().squeeze(-1)
        selection = task.spec.selection.take(short)
        exact_spec = replace(task.spec, selection=selection, max_key_norm=None, bf16_matmul=False, noise=None)
        found[short] = search_exactly(task._replace(operand=task.operand[short], spec=exact_spec))
    return found


def _search_base(task: SearchTask, base: Base, search_width: int | None) -> Tensor:  # -> (B, c)
    """Find k or more rows of the base index, -1 where a row is filtered out."""
    selection = task.spec.selection
    wanted = task.k
    if selection.excluded is not None:
        wanted += selection.excluded.shape[-1]
    if selection.rule is not None:
        wanted *= RULE_CANDIDATES_FACTOR
    filtered = None if selection.shared is task.rows.live_mask() else selection.shared
    allowed = None if filtered is None else filtered.cpu()
    queries = to_array(to_vectors(task.query, task.spec.metric))
    slots = base.search(queries, wanted, allowed, search_width=search_width).to(task.query.device)
    if selection.shared is None and selection.is_shared:
        return slots
    return slots.masked_fill_(~selection.is_visible(slots), -1)
