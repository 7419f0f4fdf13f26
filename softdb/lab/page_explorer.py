"""The part of the page that moves: rows and histograms, by temperature and by k."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdb.errors import ArgumentError
from softdb.store import SoftKVStore

__all__ = ["BINS", "PageSizes", "explorer_of"]

SHOWN = 12  # rows with a bar of their own


DIGITS = 5


BINS = 512


TEMPERATURES = 61


@dataclass(frozen=True)
class PageSizes:
    """How much a page holds.

    Attributes:
        numbers: The most numbers before the scores of rows are summed up: about 2 MB, less than plotly itself.
        fewest_rows: The fewest of the best rows whose scores stay.
    """

    numbers: int = 200_000
    fewest_rows: int = 256

    @classmethod
    def usual(cls) -> PageSizes:
        """Return the sizes that pages are written by."""
        return cls()


def explorer_of(
    store: SoftKVStore, queries: Tensor, names: Mapping[int, str], entries: list[str], sizes: PageSizes
) -> dict[str, Any]:
    """Collect what the page's script reads.

    Scores are kept as gaps, best score - score, before any temperature. Rounded to five digits, at most 5e-5 of a gap,
    they give weights exp(-x) / sum, x = gap / T, that are wrong by 5e-5 x of themselves: next to nothing where a row
    weighs much, at any temperature and however large the scores are.
    """
    ids = store.ids
    count, width = len(ids), len(entries)
    kept = count
    if count * (len(queries) + width) > sizes.numbers:
        kept = min(max(sizes.numbers // (len(queries) * (1 + width)), sizes.fewest_rows), count)

    found: list[dict[str, Any]] = []
    places: dict[int, int] = {}  # of the rows whose values are needed, by id
    widest, seconds = 0.0, []
    for query in queries:
        order, best, gaps = _ranked(store, query, count)
        widest = max(widest, float(gaps[-1]))
        seconds.append(float(gaps[1]) if count > 1 else 0.0)
        top = order[:kept].tolist()
        rest = store.get(order[kept:]).values.cpu() if width else torch.zeros(count - kept, 0, device="cpu")
        found.append(
            {
                "best": best,
                "gaps": rounded(gaps[:kept]),
                "rows": [places.setdefault(row, len(places)) for row in top] if width else [],
                "labels": [" ".join(names.get(row, f"row {row}").split()) for row in top[:SHOWN]],
                "tail": histogram(gaps[kept:], rest),
            }
        )
    values = store.get(list(places)).values.cpu() if places else torch.zeros(0, width, device="cpu")
    temperature = float(store.temperature)
    return {
        "rows": count,
        "queries": found,
        "values": rounded(values),
        "value_labels": entries,
        "temperature": temperature,
        "temperatures": [*_temperatures(temperature, widest, seconds), 0],
        "ks": [*_ks(min(kept, count - 1)), None],
    }


def _ranked(store: SoftKVStore, query: Tensor, count: int) -> tuple[Tensor, float, Tensor]:
    """All ids best first, the best score, and how far below it each score lies; scores without the temperature."""
    with torch.no_grad():
        read = store.read(query, "exact", k=count)
    if read.ids is None or read.scores is None:
        raise ArgumentError("store: expected reads with k to report ids and scores, got one that does not")
    scores = read.scores.detach().cpu().double().flatten() * float(store.temperature)
    return read.ids.cpu().flatten(), float(scores[0]), scores[0] - scores


def histogram(gaps: Tensor, values: Tensor) -> dict[str, Any]:  # (n,) ascending, (n, width)
    """The rows that are left out, as bins: how many, their mean gap, their mean value.

    A bin of n rows counts n * exp(-mean gap / T), for any temperature T. The error of that is of second order in the
    bin's width: less by at most (r x)² / 8 of itself, where r is the bin's width relative to its gaps, x = gap / T, and
    rows with an x far beyond log n have no weight left to be wrong about. Bins are equally wide in the logarithm, so r
    is the same for all: with gaps of 0.1 to 1 it is 0.0045, and the sum over all rows is right to 1e-3 at every
    temperature; where gaps differ by a factor of a million, to a few percent at the worst.
    """
    if len(gaps) == 0:
        return {"counts": [], "gaps": [], "values": []}
    high = float(gaps[-1])
    low = max(float(gaps[0]), high * 1e-6)
    if low < high:
        bins = ((gaps.clamp(min=low) / low).log() * (BINS / math.log(high / low))).long().clamp(max=BINS - 1)
    else:
        bins = torch.zeros_like(gaps, dtype=torch.int64)
    counts = torch.bincount(bins, minlength=BINS)
    filled = counts > 0
    totals = counts[filled].double()
    gap_sums = gaps.new_zeros(BINS).index_add_(0, bins, gaps)
    value_sums = gaps.new_zeros(BINS, values.shape[1]).index_add_(0, bins, values.double())
    return {
        "counts": counts[filled].tolist(),
        "gaps": rounded(gap_sums[filled] / totals),
        "values": rounded(value_sums[filled] / totals.unsqueeze(1)),
    }


def _temperatures(own: float, widest: float, seconds: list[float]) -> list[float]:
    """The slider's stops, soft to hard, with the store's own temperature among them.

    At the softest even the worst row weighs half as much as the best; at the hardest the best row of most queries
    outweighs the second by far.
    """
    if widest > 0:
        positive = sorted(second for second in seconds if second > 0)
        gap = positive[len(positive) // 2] if positive else widest
        softest, hardest = widest / math.log(2), min(max(gap / 10, widest / 1e5), widest / 100)
    else:
        softest, hardest = own * 100, own / 100
    softest, hardest = max(softest, own), min(hardest, own)
    step = math.log(hardest / softest) / (TEMPERATURES - 1)
    stops = [float(f"{softest * math.exp(step * place):.3g}") for place in range(TEMPERATURES)]
    stops[min(max(round(math.log(own / softest) / step), 0), TEMPERATURES - 1)] = own
    return stops


def _ks(most: int) -> list[int]:
    """1, 2, ... 16, and then four stops to each doubling."""
    stops = list(range(1, 17))
    while stops[-1] < most:
        stops += [stops[-1] // 4 * quarters for quarters in (5, 6, 7, 8)]
    return [stop for stop in stops if stop <= most]


def rounded(numbers: Tensor) -> Any:
    """Return numbers as nested lists, with as many digits as the page shows."""

    def shorten(nested: Any) -> Any:
        return [shorten(entry) for entry in nested] if isinstance(nested, list) else float(f"{nested:.{DIGITS}g}")

    return shorten(numbers.tolist())
