"""Which search is cheaper: through the base index, or of all rows."""

from __future__ import annotations

import math

from softdb.filters import Selection
from softdb.index.base import Base
from softdb.table.storage import RowStorage


def cost_of(base: Base, queries: int) -> float:
    """What a search costs beside an exact one."""
    return base.share * base.policy.visit_cost * queries / (queries + base.policy.first_query_cost)


def pays(base: Base, rows: RowStorage, selection: Selection, k: int, queries: int) -> bool:
    """Whether a search in the base is cheaper than an exact one of so many queries."""
    few = selection.shared_count <= max(4 * k, base.policy.few * len(rows))
    if queries == 0 or few:
        return False
    more = math.sqrt(max(1.0, k * len(rows) / selection.shared_count / max(1, base.neighbours)))
    return more * cost_of(base, queries) <= 1
