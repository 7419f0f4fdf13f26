"""Exact reads with a bias for each row, compared with reads without a bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import Case, main
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import soft_read

WIDTH, QUERIES = 64, 256
MAX_RATIO = 1.15


def cases(small: bool) -> Iterator[Case]:
    """Yield forward, and forward with backward, for each shape of the bias."""
    rows = 3_000 if small else 100_000
    yield _forward(rows)
    yield _training(rows, QUERIES, WIDTH, by_query=False)
    yield _training(rows, QUERIES, WIDTH, by_query=True)


def _forward(rows: int) -> Case:
    torch.manual_seed(0)
    store = SoftKVStore(WIDTH, WIDTH)
    store.add(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH))
    query, bias = torch.randn(QUERIES, WIDTH), torch.randn(rows)

    def read(bias: Tensor | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return store.read(query, bias=bias).values

        return run

    return Case(
        f"forward ({QUERIES}, {rows:,}), bias (n,), {WIDTH}/{WIDTH}",
        softdb={"store.read": read(bias)},
        peers={"without bias": read(None)},
        claims={("store.read", "without bias"): MAX_RATIO},
    )


def _training(rows: int, queries: int, width: int, *, by_query: bool) -> Case:
    torch.manual_seed(0)
    query = torch.randn(queries, width, requires_grad=True)
    keys, values = (torch.randn(rows, width, requires_grad=True) for _ in range(2))
    bias = torch.randn(*([queries] if by_query else []), rows, requires_grad=True)
    upstream = torch.randn(queries, width)

    def step(mask: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [query, keys, values, *([] if mask is None else [mask])]

        def run() -> tuple[Tensor, ...]:
            read = soft_read(query, keys, values, mask=mask)
            return torch.autograd.grad(read.values, leaves, upstream)

        return run

    shape = "(B, n)" if by_query else "(n,)"
    return Case(
        f"forward and backward ({queries}, {rows:,}), bias {shape}, {width}/{width}",
        softdb={"soft_read": step(bias)},
        peers={"without bias": step(None)},
        claims={} if by_query else {("soft_read", "without bias"): MAX_RATIO},
    )


if __name__ == "__main__":
    main("bias", cases)
