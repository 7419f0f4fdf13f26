"""A store of a million rows: filled by add, read in all three modes, and how much memory that takes beyond the rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, Contestant, main, peak_memory

from softdb import SoftKVStore
from softdb.reading.options import Mode

WIDTH, QUERIES, NEIGHBOURS = 64, 256, 32
CENTRES, SPREAD = 20_000, 0.4


def cases(small: bool) -> Iterator[Case]:
    """The fill, at once and in pieces; then each way to read."""
    rows = 3_000 if small else 1_000_000
    torch.manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH)
    keys = centres[torch.randint(CENTRES, (rows,))] + SPREAD * torch.randn(rows, WIDTH)
    values = torch.randn(rows, WIDTH)

    def fill(piece: int) -> SoftKVStore:
        store = SoftKVStore(WIDTH, WIDTH)
        for start in range(0, rows, piece):
            store.add(keys[start : start + piece], values[start : start + piece])
        return store

    pieces = {f"{piece:,} at a time": piece for piece in (rows, 1_000)}
    filling: dict[str, Contestant] = {name: partial(fill, piece) for name, piece in pieces.items()}
    copying: dict[str, Contestant] = {"two copies": lambda: (keys.clone(), values.clone())}
    yield Case(f"fill {rows:,} × {WIDTH}/{WIDTH}", softdb=filling, peers=copying)

    store = fill(rows)
    query = (centres[torch.randint(CENTRES, (QUERIES,))] + SPREAD * torch.randn(QUERIES, WIDTH)).requires_grad_()

    def read(mode: Mode, k: int | None) -> Contestant:
        return lambda: torch.autograd.grad(store.read(query, mode, k=k).values.sum(), query)

    ways: list[tuple[Mode, int | None]] = [("exact", None), ("hard", None), ("topk", NEIGHBOURS)]
    for mode, k in ways:
        first = peak_memory(read(mode, k)) / 2**20  # with the index, where one is built
        yield Case(
            f"{mode} ({QUERIES}, {rows:,}), forward and backward to the query",
            softdb={"store.read": read(mode, k)},
            peers={},
            facts=partial(dict[str, float], {"peak MiB": first, "MiB of the rows": 8 * rows * WIDTH / 2**20}),
        )


if __name__ == "__main__":
    main("million_rows", cases)
