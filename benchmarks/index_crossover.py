"""Top-k reads by exact search and through FAISS IVF, over a growing number of rows: where the second gets faster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, main
from torch import Tensor

from softdb import SoftKVStore

WIDTH, NEIGHBOURS = 64, 32
CENTRES, SPREAD = 20_000, 0.4
ROWS = (50_000, 100_000, 200_000, 400_000, 1_000_000)
BATCHES = (1, 16, 256)


def cases(small: bool) -> Iterator[Case]:
    """Every number of rows with every batch."""
    for rows in (2_000,) if small else ROWS:
        yield from _reads(rows, (3,) if small else BATCHES)


def _reads(rows: int, batches: tuple[int, ...]) -> Iterator[Case]:
    torch.manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH)

    def clustered(count: int) -> Tensor:
        return centres[torch.randint(CENTRES, (count,))] + SPREAD * torch.randn(count, WIDTH)

    keys, values = clustered(rows), torch.randn(rows, WIDTH)
    lists = 2 ** round(math.log2(2 * math.sqrt(rows)))
    stores = {index: SoftKVStore(WIDTH, WIDTH, index=index) for index in ("Flat", f"IVF{lists},Flat")}
    for store in stores.values():
        store.add(keys, values)
    for batch in batches:
        query = clustered(batch)
        for store in stores.values():
            _read(store, query)  # builds the index
        flat, ivf = stores.values()
        stats = ivf.index_stats()
        facts = {"recall": stats.recall or 0.0, "nprobe": stats.nprobe or 0, "build s": stats.rebuild_seconds}
        yield Case(
            f"({batch}, {rows:,}), k {NEIGHBOURS}",
            softdb={"exact": partial(_read, flat, query)},
            peers={"through IVF": partial(_read, ivf, query)},
            facts=partial(dict[str, float], facts),
        )


def _read(store: SoftKVStore, query: Tensor) -> Tensor:
    with torch.no_grad():
        return store.read(query, "topk", k=NEIGHBOURS).values


if __name__ == "__main__":
    main("index_crossover", cases)
