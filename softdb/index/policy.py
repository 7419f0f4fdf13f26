"""Set the measured thresholds of an index, in one frozen object that is passed in."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIRST_QUERY_COST", "IndexPolicy"]

# Fixed cost of an exact search, in queries multiplied with every row.
FIRST_QUERY_COST = 40


@dataclass(frozen=True)
class IndexPolicy:
    """Hold the thresholds of an index: rows, queries, and shares of a cost.

    Attributes:
        exact_rows: Row count below which "auto" searches exactly: where an IVF search that finds 95 % gets faster, from
            200,000 rows on for single queries and by a million for 256 at a time (benchmarks/index_crossover.py).
        pending_rows, pending_share: Merge pending rows into the base when they are more than this many, or than this
            share of its entries.
        small_filter_share: Search exactly where a filter leaves at most this share of the rows.
        first_query_cost: Fixed cost of an exact search, in queries.
        visit_cost: Cost of one IVF-visited row, in exact-search rows.
        max_relative_cost: Search through the base where that costs at most this many times an exact search.
        outlier_entries: Fewest entries of a base with norm outliers.
        outlier_cost, outlier_rows: Cost of one norm outlier, in exact-search rows; fixed cost of having any, in norm
            outliers.
        careful_factor, careful_share: A careful search multiplies the search width by this factor, unless it then costs
            more than this share of an exact search.
        check_after, drift_share: Check the recall on recent queries after this many; double the interval while nothing
            changes, until checks cost this share of the searches.
        checking_shares: Check the recall again when the base has merged this share of its entries: the smallest and the
            largest share.
        recall_tolerance: A check accepts a recall this far from the target, since its sample is small.
    """

    exact_rows: int = 500_000
    pending_rows: int = 4096
    pending_share: float = 1 / 8
    small_filter_share: float = 1 / 32
    first_query_cost: float = FIRST_QUERY_COST
    visit_cost: float = 10
    max_relative_cost: float = 1
    outlier_entries: int = 2**14
    outlier_cost: float = 2
    outlier_rows: int = 2**14
    careful_factor: float = 2
    careful_share: float = 1 / 8
    check_after: int = 4096
    drift_share: float = 1 / 20
    checking_shares: tuple[float, float] = (1 / 4, 1 / 2)
    recall_tolerance: float = 0.01
