"""Choose the cheaper search, and its width."""

from __future__ import annotations

import math

from softdb.filters import Selection
from softdb.index.base import Base
from softdb.table.storage import RowStorage

__all__ = ["approximate_is_cheaper", "plan_search_width"]

# A sample of queries shows no recall nearer to 1 than by this.
MIN_MISSED_SHARE = 1e-4


def relative_search_cost(base: Base, queries: int) -> float:
    """Estimate the cost of a search in the base, relative to that of an exact search."""
    return base.visited_list_share * base.policy.visit_cost * queries / (queries + base.policy.first_query_cost)


def approximate_is_cheaper(base: Base, rows: RowStorage, selection: Selection, k: int, queries: int) -> bool:
    """Test whether a search in the base costs less than an exact search of all rows."""
    few = selection.shared_count <= max(4 * k, base.policy.small_filter_share * len(rows))
    if queries == 0 or few:
        return False
    wider = math.sqrt(max(1.0, k * len(rows) / selection.shared_count / max(1, base.neighbours)))
    return wider * relative_search_cost(base, queries) <= base.policy.max_relative_cost


def plan_search_width(base: Base, queries: int, neighbours: float, *, careful: bool) -> tuple[int | None, float]:
    """Choose the search width for a number of neighbours, and estimate its recall.

    The k best rows that a filter leaves lie as far apart as a larger number of all rows: ``neighbours``.

    Returns:
        The search width, None for that of the base, and the expected recall.
    """
    policy = base.policy
    recall = min(base.recall or 0.0, 1 - MIN_MISSED_SHARE)
    now, limit = base.search_width
    wanted = now * math.sqrt(max(1.0, neighbours / max(1, base.neighbours)))
    if base.probes is None:
        wanted = max(wanted, neighbours)  # a search in a graph is at least as wide, whatever efSearch says
    width = min(limit, math.ceil(wanted))
    cost = policy.careful_factor * wanted / max(1, now) * relative_search_cost(base, queries)
    if careful and cost < policy.careful_share:
        usual, width = width, min(limit, math.ceil(policy.careful_factor * wanted))
        if limit and base.is_exact_at_full_width:
            recall = 1 - (1 - recall) * usual / width
    return (None if width == now else width), recall
