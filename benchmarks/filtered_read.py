"""Exact reads with a filter, compared with an exact read of all rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, main
from torch import Tensor

from softdb import SoftKVStore

WIDTH, QUERIES = 64, 64
# The form of the filter, the fraction of rows that it keeps, and the target ratio to the read without filter.
FILTERS = [("bool", 0.1, 0.2), ("ids", 0.1, None), ("rule", 0.1, None), ("bool", 0.9, None)]


def cases(small: bool) -> Iterator[Case]:
    """Yield a case for each filter, over the same rows."""
    rows = 3_000 if small else 1_000_000
    torch.manual_seed(0)
    store = SoftKVStore(WIDTH, WIDTH, fields=("percentile",))
    store.reserve(rows)
    percentile = (torch.rand(rows) * 100).long()
    store.add(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH), fields={"percentile": percentile})
    query = torch.randn(QUERIES, WIDTH)
    for form, fraction, limit in FILTERS:
        below = round(100 * fraction)
        mask = percentile < below
        filters = {
            "bool": mask,
            "ids": store.ids[mask],
            "rule": lambda row, below=below: row["percentile"] < below,
        }
        where = filters[form]
        yield Case(
            f"{form} that keeps {fraction:.0%} of {rows:,} rows, {QUERIES} queries",
            softdb={"store.read": partial(_read, store, query, where)},
            peers={"without filter": partial(_read, store, query, None)},
            claims={} if limit is None else {("store.read", "without filter"): limit},
        )


def _read(store: SoftKVStore, query: Tensor, where: object) -> Tensor:
    with torch.no_grad():
        return store.read(query, where=where).values  # type: ignore[arg-type]


if __name__ == "__main__":
    main("filtered_read", cases)
