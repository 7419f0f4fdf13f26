"""By which thresholds an index decides: measured, and frozen in one object that is passed in."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIRST_QUERY_COST", "IndexPolicy"]

# An exact search of some queries costs as much as the products of so many more of them with every row.
FIRST_QUERY_COST = 40


@dataclass(frozen=True)
class IndexPolicy:
    """The thresholds of an index, in rows, queries, or shares of what an exact search costs.

    Attributes:
        exact_rows: Below so many rows "auto" searches exactly: where an IVF search that finds 95 % gets faster, from
            200,000 rows on for single queries and by a million for 256 at a time (benchmarks/index_crossover.py).
        pending_rows, pending_share: The base takes pending rows in when they are more than this many, or than this
            share of it.
        few: A filter that leaves at most this share of the rows leaves so few that an exact search is cheaper.
        first_query_cost: What an exact search costs beside its products: as much as for so many queries more.
        visit_cost: A row visited in a list costs as much as this many in an exact search of all.
        outlier_entries: From so many entries on, rows with the largest norms may be searched exactly beside the base.
        outlier_cost, outlier_rows: A norm outlier costs as much as ``outlier_cost`` rows in an exact search of all, and
            having any as much as ``outlier_rows`` more of them.
        careful, careful_share: A careful search visits this many times the lists, unless it then costs more than this
            share of an exact one.
        check_after, drift_share: The recall is checked on the latest queries after so many, then twice as many as long
            as nothing changes, until checks cost this share of the searches.
        checking_shares: It is checked again when the base has taken in so many times its rows, at the least and the
            most.
        near_enough: A recall as near to the target is left alone when it is checked: the sample is small.
    """

    exact_rows: int = 500_000
    pending_rows: int = 4096
    pending_share: float = 1 / 8
    few: float = 1 / 32
    first_query_cost: float = FIRST_QUERY_COST
    visit_cost: float = 10
    outlier_entries: int = 2**14
    outlier_cost: float = 2
    outlier_rows: int = 2**14
    careful: float = 2
    careful_share: float = 1 / 8
    check_after: int = 4096
    drift_share: float = 1 / 20
    checking_shares: tuple[float, float] = (1 / 4, 1 / 2)
    near_enough: float = 0.01
