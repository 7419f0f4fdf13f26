"""Top-k reads by exact search and through FAISS IVF, by the number of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, main
from torch import Tensor

from softdb import SoftKVStore

WIDTH, NEIGHBORS = 64, 32
CENTERS, CLUSTER_STD = 20_000, 0.4
ROWS = (50_000, 100_000, 200_000, 400_000, 1_000_000)
BATCHES = (1, 16, 256)


def cases(small: bool) -> Iterator[Case]:
    """Yield a case for each number of rows and each batch size."""
    for rows in (2_000,) if small else ROWS:
        yield from _make_cases(rows, (3,) if small else BATCHES)


def _make_cases(rows: int, batches: tuple[int, ...]) -> Iterator[Case]:
    torch.manual_seed(0)
    centers = torch.randn(CENTERS, WIDTH)

    def draw_clustered(count: int) -> Tensor:
        return centers[torch.randint(CENTERS, (count,))] + CLUSTER_STD * torch.randn(count, WIDTH)

    keys, values = draw_clustered(rows), torch.randn(rows, WIDTH)
    lists = 2 ** round(math.log2(2 * math.sqrt(rows)))
    stores = {index: SoftKVStore(WIDTH, WIDTH, index=index) for index in ("Flat", f"IVF{lists},Flat")}
    for store in stores.values():
        store.add(keys, values)
    for batch in batches:
        query = draw_clustered(batch)
        for store in stores.values():
            _read(store, query)  # Builds the index.
        flat, ivf = stores.values()
        stats = ivf.index_stats()
        facts = {"recall": stats.recall or 0.0, "nprobe": stats.nprobe or 0, "build s": stats.rebuild_seconds}
        yield Case(
            f"({batch}, {rows:,}), k {NEIGHBORS}",
            softdb={"exact": partial(_read, flat, query)},
            peers={"through IVF": partial(_read, ivf, query)},
            facts=partial(dict[str, float], facts),
        )


def _read(store: SoftKVStore, query: Tensor) -> Tensor:
    with torch.no_grad():
        return store.read(query, "topk", k=NEIGHBORS).values


if __name__ == "__main__":
    main("index_crossover", cases)
