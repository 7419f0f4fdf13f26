"""Data of the page's sliders and bars: scores, histograms, temperatures and ks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdb.errors import ArgumentError
from softdb.store import SoftKVStore

__all__ = ["HISTOGRAM_BINS", "PageSizes", "build_explorer"]

MAX_BARS = 12


SIGNIFICANT_DIGITS = 5


HISTOGRAM_BINS = 512  # of the histogram of the scores that the page does not contain


TEMPERATURE_STOPS = 61  # of the slider


@dataclass(frozen=True)
class PageSizes:
    """Maximum sizes of the data on a page.

    Attributes:
        numbers: Maximum number of scores and value entries before a histogram replaces the lowest scores. 200,000
            numbers take about 2 MB, less than plotly.
        fewest_rows: Minimum number of rows whose scores the page contains.
    """

    numbers: int = 200_000
    fewest_rows: int = 256

    @classmethod
    def usual(cls) -> PageSizes:
        """Return the limits that `write_page` uses."""
        return cls()


def build_explorer(
    store: SoftKVStore, queries: Tensor, names: Mapping[int, str], entries: list[str], sizes: PageSizes
) -> dict[str, Any]:
    """Build the data that the page's script reads.

    The score of a row is stored as its gap, ``best score - score``, at temperature 1. Gaps are rounded to five digits,
    so their relative error is at most 5e-5. A weight is ``exp(-x) / sum`` with ``x = gap / temperature``, so its
    relative error is about 5e-5 x. Rows with a large weight have a small x, so their error is negligible at every
    temperature and scale of the scores.
    """
    ids = store.ids
    count, width = len(ids), len(entries)
    kept = count
    if count * (len(queries) + width) > sizes.numbers:
        kept = min(max(sizes.numbers // (len(queries) * (1 + width)), sizes.fewest_rows), count)

    found: list[dict[str, Any]] = []
    places: dict[int, int] = {}  # id -> place of the row's value in the data
    widest, seconds = 0.0, []
    for query in queries:
        order, best, gaps = _rank_rows(store, query, count)
        widest = max(widest, float(gaps[-1]))
        seconds.append(float(gaps[1]) if count > 1 else 0.0)
        top = order[:kept].tolist()
        rest = store.get(order[kept:]).values.cpu() if width else torch.zeros(count - kept, 0, device="cpu")
        found.append(
            {
                "best": best,
                "gaps": round_to_digits(gaps[:kept]),
                "rows": [places.setdefault(row, len(places)) for row in top] if width else [],
                "labels": [" ".join(names.get(row, f"row {row}").split()) for row in top[:MAX_BARS]],
                "tail": build_histogram(gaps[kept:], rest),
            }
        )
    values = store.get(list(places)).values.cpu() if places else torch.zeros(0, width, device="cpu")
    temperature = float(store.temperature)
    return {
        "rows": count,
        "queries": found,
        "values": round_to_digits(values),
        "value_labels": entries,
        "temperature": temperature,
        "temperatures": [*_choose_temperatures(temperature, widest, seconds), 0],
        "ks": [*_choose_ks(min(kept, count - 1)), None],
    }


def _rank_rows(store: SoftKVStore, query: Tensor, count: int) -> tuple[Tensor, float, Tensor]:
    """Return the ids, best first, the best score, and the gap of each row.

    Scores are at temperature 1.
    """
    with torch.no_grad():
        read = store.read(query, "exact", k=count)
    if read.ids is None or read.scores is None:
        raise ArgumentError("store: expected reads with k to report ids and scores, got a read without them")
    scores = read.scores.detach().cpu().double().flatten() * float(store.temperature)
    return read.ids.cpu().flatten(), float(scores[0]), scores[0] - scores


def build_histogram(gaps: Tensor, values: Tensor) -> dict[str, Any]:  # (n,) ascending, (n, width)
    """Build the histogram of rows: count, mean gap and mean value of each bin.

    At every temperature T, the page uses ``n * exp(-mean gap / T)`` as the weight of a bin of n rows. This is too small
    by a relative error of at most (r x)² / 8, where r is the width of the bin relative to its gaps and
    ``x = gap / T``. Rows with x far above log n have nearly no weight, so their error does not matter. The bins have
    equal width on a logarithmic scale, so r is the same for all bins. With gaps from 0.1 to 1, r is 0.0045 and the sum
    over all rows has a relative error of 1e-3 at every temperature. With gaps that differ by a factor of a million, the
    error is a few percent at most.
    """
    if len(gaps) == 0:
        return {"counts": [], "gaps": [], "values": []}
    high = float(gaps[-1])
    low = max(float(gaps[0]), high * 1e-6)
    if low < high:
        bins = (
            ((gaps.clamp(min=low) / low).log() * (HISTOGRAM_BINS / math.log(high / low)))
            .long()
            .clamp(max=HISTOGRAM_BINS - 1)
        )
    else:
        bins = torch.zeros_like(gaps, dtype=torch.int64)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS)
    filled = counts > 0
    totals = counts[filled].double()
    gap_sums = gaps.new_zeros(HISTOGRAM_BINS).index_add_(0, bins, gaps)
    value_sums = gaps.new_zeros(HISTOGRAM_BINS, values.shape[1]).index_add_(0, bins, values.double())
    return {
        "counts": counts[filled].tolist(),
        "gaps": round_to_digits(gap_sums[filled] / totals),
        "values": round_to_digits(value_sums[filled] / totals.unsqueeze(1)),
    }


def _choose_temperatures(own: float, widest: float, seconds: list[float]) -> list[float]:
    """Choose the temperatures of the slider, descending, including the store's own.

    At the highest temperature, the worst row has half the weight of the best row. At the lowest, the best row of most
    queries has nearly all weight.

    Args:
        own: The store's temperature.
        widest: Largest gap of all queries.
        seconds: Gap of the second best row, for each query.
    """
    if widest > 0:
        positive = sorted(second for second in seconds if second > 0)
        gap = positive[len(positive) // 2] if positive else widest
        softest, hardest = widest / math.log(2), min(max(gap / 10, widest / 1e5), widest / 100)
    else:
        softest, hardest = own * 100, own / 100
    softest, hardest = max(softest, own), min(hardest, own)
    step = math.log(hardest / softest) / (TEMPERATURE_STOPS - 1)
    stops = [float(f"{softest * math.exp(step * place):.3g}") for place in range(TEMPERATURE_STOPS)]
    stops[min(max(round(math.log(own / softest) / step), 0), TEMPERATURE_STOPS - 1)] = own
    return stops


def _choose_ks(most: int) -> list[int]:
    """Choose the ks of the slider, at most ``most``: 1 to 16, then 4 per doubling."""
    stops = list(range(1, 17))
    while stops[-1] < most:
        stops += [stops[-1] // 4 * quarters for quarters in (5, 6, 7, 8)]
    return [stop for stop in stops if stop <= most]


def round_to_digits(numbers: Tensor) -> Any:
    """Round to `SIGNIFICANT_DIGITS` digits; return nested lists."""

    def shorten(nested: Any) -> Any:
        return (
            [shorten(entry) for entry in nested]
            if isinstance(nested, list)
            else float(f"{nested:.{SIGNIFICANT_DIGITS}g}")
        )

    return shorten(numbers.tolist())
