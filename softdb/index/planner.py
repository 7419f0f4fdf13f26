"""Choose between approximate and exact search, and the search width."""

from __future__ import annotations

import math

from softdb.filters import Selection
from softdb.index.base import Base
from softdb.table.storage import RowStorage

__all__ = ["approximate_is_cheaper", "plan_search_width"]

# An estimated recall is at most 1 minus this fraction: a sample of queries cannot show a higher one.
MIN_MISSED_FRACTION = 1e-4


def estimate_relative_cost(base: Base, queries: int) -> float:
    """Estimate the cost of a search in the base index, relative to an exact search."""
    return base.visited_list_fraction * base.policy.visit_cost * queries / (queries + base.policy.first_query_cost)


def approximate_is_cheaper(base: Base, rows: RowStorage, selection: Selection, k: int, queries: int) -> bool:
    """Return whether a search in the base index is cheaper than an exact one."""
    is_small = selection.shared_count <= max(4 * k, base.policy.small_filter_fraction * len(rows))
    if queries == 0 or is_small:
        return False
    wider = math.sqrt(max(1.0, k * len(rows) / selection.shared_count / max(1, base.neighbors)))
    return wider * estimate_relative_cost(base, queries) <= base.policy.max_relative_cost


def plan_search_width(base: Base, queries: int, neighbors: float, *, careful: bool) -> tuple[int | None, float]:
    """Choose the search width for a number of neighbors, and estimate its recall.

    A filter requires a wider search: the k best rows that it allows are expected among the ``neighbors`` best of all.

    Returns:
        The search width, None for that of the base index, and the expected recall.
    """
    policy = base.policy
    recall = min(base.recall or 0.0, 1 - MIN_MISSED_FRACTION)
    now, limit = base.search_width
    wanted = now * math.sqrt(max(1.0, neighbors / max(1, base.neighbors)))
    if base.probes is None:
        wanted = max(wanted, neighbors)  # FAISS searches a graph at least this widely, even if efSearch is smaller
    width = min(limit, math.ceil(wanted))
    cost = policy.careful_factor * wanted / max(1, now) * estimate_relative_cost(base, queries)
    if careful and cost < policy.careful_fraction:
        usual, width = width, min(limit, math.ceil(policy.careful_factor * wanted))
        if limit and base.is_exact_at_full_width:
            recall = 1 - (1 - recall) * usual / width
    return (None if width == now else width), recall
