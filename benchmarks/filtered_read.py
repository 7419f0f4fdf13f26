"""An exact read of the rows that a filter leaves, beside one of all rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, main
from torch import Tensor

from softdb import SoftKVStore

WIDTH, QUERIES = 64, 64
# The filter's form, the share of rows that it leaves, and what is promised beside the unfiltered read.
FILTERS = [("bool", 0.1, 0.2), ("ids", 0.1, None), ("rule", 0.1, None), ("bool", 0.9, None)]


def cases(small: bool) -> Iterator[Case]:
    """Every filter over the same rows."""
    rows = 3_000 if small else 1_000_000
    torch.manual_seed(0)
    store = SoftKVStore(WIDTH, WIDTH, fields=("kept",))
    store.reserve(rows)
    draw = torch.rand(rows)
    share = (draw * 100).long()
    store.add(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH), fields={"kept": share})
    query = torch.randn(QUERIES, WIDTH)
    for form, kept, limit in FILTERS:
        below = round(100 * kept)
        chosen = share < below
        where = {"bool": chosen, "ids": store.ids[chosen], "rule": lambda row, below=below: row["kept"] < below}[form]
        yield Case(
            f"{form} that keeps {kept:.0%} of {rows:,} rows, {QUERIES} queries",
            softdb={"store.read": partial(_read, store, query, where)},
            peers={"without filter": partial(_read, store, query, None)},
            claims={} if limit is None else {("store.read", "without filter"): limit},
        )


def _read(store: SoftKVStore, query: Tensor, where: object) -> Tensor:
    with torch.no_grad():
        return store.read(query, where=where).values  # type: ignore[arg-type]


if __name__ == "__main__":
    main("filtered_read", cases)
