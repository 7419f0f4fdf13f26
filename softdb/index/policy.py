"""Define the thresholds of an index.

They are fields of one frozen object, which is passed to the index.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIRST_QUERY_COST", "IndexPolicy"]

# Fixed cost of an exact search. The unit is the cost of multiplying one query with every row.
FIRST_QUERY_COST = 40


@dataclass(frozen=True)
class IndexPolicy:
    """Thresholds of an index, in rows, queries, and fractions of a cost.

    Attributes:
        exact_rows: Number of rows below which "auto" searches exactly. An IVF search with a recall of 95 % is faster
            from 200,000 rows on for single queries, and from a million rows on for batches of 256
            (benchmarks/index_crossover.py).
        gpu_exact_rows: The same number for keys on a GPU. FAISS searches on the CPU: each search waits for the GPU, and
            copies queries and candidates. The number is an assumption, not a measurement.
        pending_rows: Merge pending rows into the base index when their number exceeds this.
        pending_fraction: Merge pending rows into the base index when they exceed this fraction of its entries.
        small_filter_fraction: Search exactly if a filter allows at most this fraction of the rows.
        first_query_cost: Fixed cost of an exact search, in units of the cost of one query.
        visit_cost: Cost of one IVF-visited row, in exact-search rows.
        max_relative_cost: Search the base index if its cost is at most this multiple of that of an exact search.
        outlier_entries: Minimum number of entries of a base index with norm outliers.
        outlier_cost: Cost of one norm outlier, in exact-search rows.
        outlier_rows: Fixed cost of a search of norm outliers, in units of the cost of one norm outlier.
        careful_factor: Factor by which a careful search multiplies the search width.
        careful_fraction: Maximum cost of a careful search, as a fraction of the cost of an exact search.
        check_after: Number of queries after which the recall on recent queries is checked. The interval doubles while
            the search width stays the same.
        drift_fraction: Maximum cost of the checks on recent queries, as a fraction of the cost of the searches.
        tuning_fractions: Minimum and maximum of `softdb.index.base.Base.tuning_fraction`.
        recall_tolerance: Difference from the recall target that a check accepts, since it measures few queries.
    """

    exact_rows: int = 500_000
    gpu_exact_rows: int = 10_000_000
    pending_rows: int = 4096
    pending_fraction: float = 1 / 8
    small_filter_fraction: float = 1 / 32
    first_query_cost: float = FIRST_QUERY_COST
    visit_cost: float = 10
    max_relative_cost: float = 1
    outlier_entries: int = 2**14
    outlier_cost: float = 2
    outlier_rows: int = 2**14
    careful_factor: float = 2
    careful_fraction: float = 1 / 8
    check_after: int = 4096
    drift_fraction: float = 1 / 20
    tuning_fractions: tuple[float, float] = (1 / 4, 1 / 2)
    recall_tolerance: float = 0.01
