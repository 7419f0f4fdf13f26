"""Time to fill and read a store of a million rows, and memory beyond the rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, Contestant, main, measure_peak_memory

from softdb import SoftKVStore
from softdb.reading.options import Mode

WIDTH, QUERIES, NEIGHBORS = 64, 256, 32
CENTERS, CLUSTER_STD = 20_000, 0.4


def cases(small: bool) -> Iterator[Case]:
    """Yield `add` of all rows, in one call and in many, then each mode of reads."""
    rows = 3_000 if small else 1_000_000
    torch.manual_seed(0)
    centers = torch.randn(CENTERS, WIDTH)
    keys = centers[torch.randint(CENTERS, (rows,))] + CLUSTER_STD * torch.randn(rows, WIDTH)
    values = torch.randn(rows, WIDTH)

    def fill(batch: int) -> SoftKVStore:
        store = SoftKVStore(WIDTH, WIDTH)
        for start in range(0, rows, batch):
            store.add(keys[start : start + batch], values[start : start + batch])
        return store

    fills: dict[str, Contestant] = {f"{batch:,} at a time": partial(fill, batch) for batch in (rows, 1_000)}
    copies: dict[str, Contestant] = {"two copies": lambda: (keys.clone(), values.clone())}
    yield Case(f"fill {rows:,} × {WIDTH}/{WIDTH}", softdb=fills, peers=copies)

    store = fill(rows)
    query = centers[torch.randint(CENTERS, (QUERIES,))] + CLUSTER_STD * torch.randn(QUERIES, WIDTH)
    query.requires_grad_()

    def read(mode: Mode, k: int | None) -> Contestant:
        return lambda: torch.autograd.grad(store.read(query, mode, k=k).values.sum(), query)

    modes: list[tuple[Mode, int | None]] = [("exact", None), ("hard", None), ("topk", NEIGHBORS)]
    for mode, k in modes:
        peak = measure_peak_memory(read(mode, k)) / 2**20  # Includes the build of the index, if the read needs one.
        yield Case(
            f"{mode} ({QUERIES}, {rows:,}), forward and backward to the query",
            softdb={"store.read": read(mode, k)},
            peers={},
            facts=partial(dict[str, float], {"peak MiB": peak, "MiB of the rows": 8 * rows * WIDTH / 2**20}),
        )


if __name__ == "__main__":
    main("million_rows", cases)
