"""Tune the search width: find the least that reaches a recall target.

One search over levels, `find_level`, serves both occasions:

- `tune_base`, while no other search runs: when a base is built, and when it has merged many rows. It chooses the norm
  outliers as well.
- `check_recent_queries`, between searches: when queries may have become others. It changes nothing but the width.
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

# Queries that a recall is checked on again.
CHECKING_QUERIES = 64

# Fewest IVF lists that a query visits, and fewest norm outliers where there are any.
MIN_PROBES, MIN_OUTLIERS = 1, 64

# Stop bisecting where this part of the search width is left.
WIDTH_RESOLUTION = 8


class SearchLevel(NamedTuple):
    """Hold the search width, and the number of norm outliers."""

    width: int
    outliers: int


@dataclass(frozen=True)
class RecallTarget:
    """Decide from a measured recall whether a search level is wide enough.

    Attributes:
        recall: The recall target.
        near: A recall this far above or below the target leaves the level as it is.
        climb_near: A level that misses the target is raised until the recall is this near.
        beyond_chance: Whether to count the recall less its standard error. A sample for tuning has to be right for
            other queries; a smaller one for checking is not to move the level by chance.
    """

    recall: float
    near: float
    climb_near: float
    beyond_chance: bool

    def is_met(self, measured: MeasuredRecall) -> bool:
        """Test whether the recall reaches the target."""
        return (measured.lower if self.beyond_chance else measured.mean) >= self.recall

    def is_missed(self, measured: MeasuredRecall, near: float) -> bool:
        """Test whether the recall is below the target, by more than ``near``.

        With ``beyond_chance`` its standard error is the margin instead.
        """
        return measured.lower < self.recall if self.beyond_chance else measured.mean < self.recall - near

    def is_exceeded(self, measured: MeasuredRecall) -> bool:
        """Test whether a narrower search may reach the target, too."""
        return measured.mean > self.recall + self.near


def find_level(
    levels: Sequence[SearchLevel],
    start: int,
    measure: Callable[[SearchLevel], MeasuredRecall],
    target: RecallTarget,
    *,
    keep: bool,
) -> tuple[SearchLevel, float]:
    """Find the cheapest level, about, that reaches a recall target.

    Climb the levels until one reaches it, then bisect the search width between that and the level below.

    Args:
        levels: From the cheapest on, in doublings.
        start: The position of the present level among them.
        measure: Measures the recall at a level.
        target: The recall target.
        keep: Whether to keep the present level exactly where its recall is near the target. Otherwise bisect in any
            case, after trying the level below one that exceeds the target.

    Returns:
        The level, and its mean recall.
    """
    position, level = start, levels[start]
    measured = measure(level)
    if target.is_missed(measured, target.near):
        # The sample is the same for all levels: where it is a hard one, the recall target is far off.
        while target.is_missed(measured, target.climb_near) and position < len(levels) - 1:
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
    neighbours: int,
) -> None:
    """Set the search width and norm outliers with which a base reaches its target.

    Each group of queries reaches it. The base has no norm outliers at the call: rows that are not pending are visible.

    Args:
        base: The base.
        groups: Queries, (m, d) each.
        keys: The present keys, (capacity, d).
        metric: How they are scored.
        selection: Which slots hold rows.
        recall: The recall target.
        neighbours: The number of nearest rows of which the recall is a share.
    """
    policy, is_tuned = base.policy, base.recall is not None
    base.merged_rows, base.norm_outliers, base.neighbours = 0, base.norm_outliers[:0], neighbours
    sample = RecallSample(groups, keys, metric, selection, min(neighbours, base.entries))
    has_outliers = metric in OUTLIER_METRICS and base.entries >= policy.outlier_entries
    longest = find_norm_outliers(keys, selection) if has_outliers else sample.best.new_empty(0)
    rank = sample.best.new_full((len(keys),), len(keys))  # (capacity,): the place of a slot among the longest
    rank[longest] = torch.arange(len(longest), device=rank.device)
    vectors = to_array(to_vectors(sample.queries, metric))

    def measure(level: SearchLevel) -> MeasuredRecall:
        set_search_width(base.index, level.width)
        found = base.search(vectors, sample.k).to(keys.device)
        hits = sample.hits(found) & (rank[found.clamp(min=0)] >= level.outliers)  # an outlier counts once
        outliers = (rank[sample.best.clamp(min=0)] < level.outliers) & (sample.best >= 0)
        return sample.measure(hits.sum(-1) + outliers.sum(-1))

    width, limit = get_search_width(base.index)
    levels = _make_levels(base, limit, len(longest))
    start, now = 0, SearchLevel(width, base.outlier_count)
    if is_tuned:
        start = sum(level.width < now.width or level.outliers < now.outliers for level in levels[:-1])
    near = policy.recall_tolerance
    target = RecallTarget(recall, near, near / 2, beyond_chance=not is_tuned)
    level, base.recall = find_level(levels, start, measure, target, keep=False)
    set_search_width(base.index, level.width)
    base.check_after = policy.check_after
    if is_tuned:  # check again the sooner, the more had to be changed
        share = base.checking_share * (0.5 if level != now else 2)
        least, most = policy.checking_shares
        base.checking_share = min(max(share, least), most)
    count = level.outliers
    shortest = longest[count - 1 : count] if count else longest[:1]
    norm = torch.linalg.vector_norm(keys[shortest], dtype=compute_dtype(keys))
    base.outlier_norm = float(norm) if len(shortest) else math.inf
    base.norm_outliers, base.outlier_count = longest[:count].sort().values.cpu(), count
    base.hide(base.norm_outliers)


def _make_levels(base: Base, limit: int, longest: int) -> list[SearchLevel]:
    """Make search levels in doublings, from the cheapest to the limits."""
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
    """Check the recall on recent queries where due, and adapt the search width.

    It is due where queries may have become others, or ask for more neighbours. Checks cost little in comparison with
    the searches: they depend on the number of queries, not on the clock. Nothing changes but the search width: other
    searches may use the base at the same time.

    Args:
        base: The base.
        queries: Recent queries.
        exact_slots: The slots that are searched exactly next to the base.
        keys: The present keys, (capacity, d).
        rows: Which slots hold rows.
        metric: How they are scored.
        recall: The recall target.
    """
    if queries.latest is None or not queries.usable_count:
        return
    enough = min(queries.usable_count, CHECKING_QUERIES)
    is_first = enough >= max(1, 2 * base.tuned_queries) or base.neighbours < queries.neighbours
    if not is_first and queries.since_check < base.check_after:
        return
    policy = base.policy
    selection, k = select(rows, (), None, None), min(queries.neighbours, len(rows))
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
    near = policy.recall_tolerance
    target = RecallTarget(recall, near, near, beyond_chance=is_first)
    level, measured = find_level([SearchLevel(width, 0) for width in widths], 1, measure, target, keep=True)
    base.set_search_width(level.width)
    base.recall, base.neighbours, base.tuned_queries = measured, queries.neighbours, len(sample.queries)
    base.recall_checks += 1
    queries.since_check = 0
    base.check_after = _next_check(base, policy, is_changed=level.width != now)


def _next_check(base: Base, policy: IndexPolicy, *, is_changed: bool) -> int:
    """Choose the number of queries after which to check the recall again."""
    cost = CHECKING_QUERIES + policy.first_query_cost
    affordable = cost / (policy.drift_share * policy.visit_cost * base.visited_entry_share)
    longer = policy.check_after if is_changed else 2 * base.check_after
    return max(policy.check_after, min(longer, math.ceil(affordable)))
