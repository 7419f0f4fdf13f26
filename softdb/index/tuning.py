"""Tune the search width: find the smallest width that reaches a recall target.

Two functions tune a base index. Both use `find_level` to search over levels:

- `tune_base` runs when a base index has been built or has merged many rows, while no other search runs. It chooses the
  norm outliers as well.
- `check_recent_queries` runs between searches, when the distribution of queries may have changed. It changes the search
  width only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softdb.filters import Selection, select
from softdb.index.base import Base
from softdb.index.faiss_parts import get_search_width, set_search_width, to_array, to_vectors
from softdb.index.norm_outliers import OUTLIER_METRICS, find_norm_outliers
from softdb.index.policy import IndexPolicy
from softdb.index.recall import MeasuredRecall, RecallSample
from softdb.index.recent_queries import TUNING_QUERIES, RecentQueries
from softdb.index.search import SearchTask, find_candidates
from softdb.scoring.metrics import compute_dtype
from softdb.table.storage import RowStorage

__all__ = ["CHECKING_QUERIES", "check_recent_queries", "tune_base"]

# Number of queries on which a recall is checked again.
CHECKING_QUERIES = 64

# Minimum number of IVF lists that a query visits, and minimum number of norm outliers if there are any.
MIN_PROBES, MIN_OUTLIERS = 1, 64

# Stop bisecting when the interval is at most the search width divided by this number.
WIDTH_RESOLUTION = 8


class SearchLevel(NamedTuple):
    """Search width and number of norm outliers."""

    width: int
    outliers: int


@dataclass(frozen=True)
class RecallTarget:
    """Target for the recall of a search level, with tolerances.

    Attributes:
        recall: Recall target.
        tolerance: Keep the present level if its recall differs from the target by at most this number.
        climb_tolerance: When the level is raised, stop at a recall that is below the target by at most this number.
        use_lower_bound: Whether to compare the recall minus its standard error with the target. This is True when a
            base index is tuned for the first time, and at the first check for a number of queries or neighbors, so that
            other queries reach the target. It is False later, so that noise of a small sample does not change the
            level.
    """

    recall: float
    tolerance: float
    climb_tolerance: float
    use_lower_bound: bool

    def is_met(self, measured: MeasuredRecall) -> bool:
        """Return whether the recall reaches the target."""
        return (measured.lower if self.use_lower_bound else measured.mean) >= self.recall

    def is_missed(self, measured: MeasuredRecall, tolerance: float) -> bool:
        """Return whether the recall is below the target by more than ``tolerance``.

        With ``use_lower_bound`` the tolerance is ignored, and the lower bound is compared with the target.
        """
        return measured.lower < self.recall if self.use_lower_bound else measured.mean < self.recall - tolerance

    def is_exceeded(self, measured: MeasuredRecall) -> bool:
        """Return whether a narrower search may reach the target as well."""
        return measured.mean > self.recall + self.tolerance


def find_level(
    levels: Sequence[SearchLevel],
    start: int,
    measure: Callable[[SearchLevel], MeasuredRecall],
    target: RecallTarget,
    *,
    keep: bool,
) -> tuple[SearchLevel, float]:
    """Find approximately the cheapest level that reaches a recall target.

    Raise the level until it reaches the target, then bisect the search width between that level and the one below.

    Args:
        levels: Levels in ascending order of cost; each doubles the search width or the number of norm outliers.
        start: Position of the present level.
        measure: Function that measures the recall at a level.
        target: Recall target.
        keep: Whether to keep the present level unchanged if its recall is within the tolerance. Otherwise the width is
            always bisected, after trying the level below if the target is exceeded.

    Returns:
        The level and its mean recall.
    """
    position, level = start, levels[start]
    measured = measure(level)
    if target.is_missed(measured, target.tolerance):
        # All levels are measured on the same sample. If it is unusually difficult, a recall equal to the target would
        # require a search that is too wide, so a small difference is accepted.
        while target.is_missed(measured, target.climb_tolerance) and position < len(levels) - 1:
            position += 1
            level = levels[position]
            measured = measure(level)
    elif not keep and target.is_exceeded(measured) and position > 0:
        below = measure(levels[position - 1])
        if target.is_met(below):
            position, measured = position - 1, below
        level = levels[position]
    lowest = level.width
    if position > 0 and (not keep or position != start or target.is_exceeded(measured)):
        lowest = levels[position - 1].width
    while level.width - lowest > max(1, level.width // WIDTH_RESOLUTION):
        middle = level._replace(width=(lowest + level.width) // 2)
        narrower = measure(middle)
        if target.is_met(narrower):
            level, measured = middle, narrower
        else:
            lowest = middle.width
    return level, measured.mean


def tune_base(
    base: Base,
    groups: list[Tensor],
    keys: Tensor,
    metric: str,
    selection: Selection,
    recall: float,
    neighbors: int,
) -> None:
    """Set the search width and norm outliers so that a base reaches its target.

    Each group of queries has to reach the target. Rows that are not pending must be visible, so the caller merges
    earlier norm outliers first.

    Args:
        base: Base index.
        groups: Groups of queries, (m, d) each.
        keys: Present keys by slot, (capacity, d).
        metric: Metric of the scores.
        selection: Slots that hold rows.
        recall: Recall target.
        neighbors: Number of nearest rows k for which the recall is measured.
    """
    policy, is_tuned = base.policy, base.recall is not None
    base.merged_rows, base.norm_outliers, base.neighbors = 0, base.norm_outliers[:0], neighbors
    sample = RecallSample(groups, keys, metric, selection, min(neighbors, base.entries))
    has_outliers = metric in OUTLIER_METRICS and base.entries >= policy.outlier_entries
    longest = find_norm_outliers(keys, selection) if has_outliers else sample.best.new_empty(0)
    rank = sample.best.new_full((len(keys),), len(keys))  # (capacity,): rank of a slot by norm
    rank[longest] = torch.arange(len(longest), device=rank.device)
    vectors = to_array(to_vectors(sample.queries, metric))

    def measure(level: SearchLevel) -> MeasuredRecall:
        set_search_width(base.index, level.width)
        found = base.search(vectors, sample.k).to(keys.device)
        hits = sample.hits(found) & (rank[found.clamp(min=0)] >= level.outliers)  # outliers are counted below
        outliers = (rank[sample.best.clamp(min=0)] < level.outliers) & (sample.best >= 0)
        return sample.measure(hits.sum(-1) + outliers.sum(-1))

    width, limit = get_search_width(base.index)
    levels = _make_levels(base, limit, len(longest))
    start, now = 0, SearchLevel(width, base.outlier_count)
    if is_tuned:
        start = sum(level.width < now.width or level.outliers < now.outliers for level in levels[:-1])
    tolerance = policy.recall_tolerance
    target = RecallTarget(recall, tolerance, tolerance / 2, use_lower_bound=not is_tuned)
    level, base.recall = find_level(levels, start, measure, target, keep=False)
    set_search_width(base.index, level.width)
    base.check_after = policy.check_after
    if is_tuned:  # tune again sooner if the level has changed, later if not
        fraction = base.tuning_fraction * (0.5 if level != now else 2)
        smallest, largest = policy.tuning_fractions
        base.tuning_fraction = min(max(fraction, smallest), largest)
    count = level.outliers
    shortest = longest[count - 1 : count] if count else longest[:1]
    norm = torch.linalg.vector_norm(keys[shortest], dtype=compute_dtype(keys))
    base.outlier_norm = float(norm) if len(shortest) else math.inf
    base.norm_outliers, base.outlier_count = longest[:count].sort().values.cpu(), count
    base.hide(base.norm_outliers)


def _make_levels(base: Base, limit: int, longest: int) -> list[SearchLevel]:
    """Make search levels in doubling steps, from the cheapest to the limits."""
    policy, width, outliers = base.policy, min(MIN_PROBES, limit), 0
    rows_per_list = base.entries / max(1, base.lists)
    levels = [SearchLevel(width, outliers)]
    while width < limit or outliers < longest:
        outlier_cost = policy.outlier_cost * (outliers + policy.outlier_rows)
        if outliers < longest and (width == limit or outlier_cost < policy.visit_cost * width * rows_per_list):
            outliers = min(longest, max(MIN_OUTLIERS, 2 * outliers))
        else:
            width = min(limit, 2 * width)
        levels.append(SearchLevel(width, outliers))
    return levels


def check_recent_queries(
    base: Base,
    queries: RecentQueries,
    exact_slots: Tensor,
    keys: Tensor,
    rows: RowStorage,
    metric: str,
    recall: float,
) -> None:
    """Check the recall on recent queries if due, and adapt the search width.

    A check is due after a number of queries. It is also due when queries ask for more neighbors than before, or when
    the number of recent queries on which to measure has doubled. The interval grows until checks are cheap in
    comparison with the searches; it does not depend on the clock. Only the search width changes, since other searches
    may use the base index at the same time.

    Args:
        base: Base index.
        queries: Recent queries.
        exact_slots: Slots that are searched exactly in addition to the base index.
        keys: Present keys by slot, (capacity, d).
        rows: Storage of the rows.
        metric: Metric of the scores.
        recall: Recall target.
    """
    if queries.latest is None or not queries.usable_count:
        return
    enough = min(queries.usable_count, CHECKING_QUERIES)
    is_first = enough >= max(1, 2 * base.tuned_queries) or base.neighbors < queries.neighbors
    if not is_first and queries.since_check < base.check_after:
        return
    policy = base.policy
    selection, k = select(rows, (), None, None), min(queries.neighbors, len(rows))
    sample = RecallSample(
        [queries.latest[-(TUNING_QUERIES if is_first else CHECKING_QUERIES) :]], keys, metric, selection, k
    )
    task = SearchTask(sample.queries, sample.operand, keys, rows, sample.spec, k)

    def measure(level: SearchLevel) -> MeasuredRecall:
        return sample.measure(sample.hits(find_candidates(task, base, exact_slots, level.width or None)).sum(-1))

    now, limit = base.search_width
    widths = [now // 2, now]
    while widths[-1] < limit:
        widths.append(min(limit, 2 * widths[-1]))
    tolerance = policy.recall_tolerance
    target = RecallTarget(recall, tolerance, tolerance, use_lower_bound=is_first)
    level, measured = find_level([SearchLevel(width, 0) for width in widths], 1, measure, target, keep=True)
    base.set_search_width(level.width)
    base.recall, base.neighbors, base.tuned_queries = measured, queries.neighbors, len(sample.queries)
    base.recall_checks += 1
    queries.since_check = 0
    base.check_after = _next_check(base, policy, is_changed=level.width != now)


def _next_check(base: Base, policy: IndexPolicy, *, is_changed: bool) -> int:
    """Return the number of queries after which to check the recall again."""
    cost = CHECKING_QUERIES + policy.first_query_cost
    affordable = cost / (policy.drift_fraction * policy.visit_cost * base.visited_entry_fraction)
    longer = policy.check_after if is_changed else 2 * base.check_after
    return max(policy.check_after, min(longer, math.ceil(affordable)))
