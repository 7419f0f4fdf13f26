"""Steps of row optimizers with row-sparse gradients, compared with SparseAdam."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from harness import Case, Contestant, main
from torch import nn

from softdb.optim import RowAdagrad, RowAdam

WIDTH = 64
# Number of gradients of different rows. With one gradient, its rows would stay in the cache.
GRADIENTS = 16


def cases(small: bool) -> Iterator[Case]:
    """Yield one case: a step that updates 8,192 of a million rows."""
    yield _make_case(1_000 if small else 1_000_000, 32 if small else 8192)


def _make_case(rows: int, touched: int) -> Case:
    torch.manual_seed(0)
    gradients = [
        torch.sparse_coo_tensor(
            torch.randperm(rows)[:touched].sort().values[None],
            torch.randn(touched, WIDTH),
            (rows, WIDTH),
            is_coalesced=True,
            check_invariants=False,
        )
        for _ in range(GRADIENTS)
    ]
    start = torch.randn(rows, WIDTH)

    def make_step(kind: type[torch.optim.Optimizer], **options: Any) -> Contestant:
        parameter = nn.Parameter(start.clone())
        optimizer = kind([parameter], **options)
        rounds = itertools.cycle(gradients)

        def step() -> None:
            parameter.grad = next(rounds)
            optimizer.step()

        return step

    return Case(
        f"step, {touched:,} of {rows:,} rows of width {WIDTH}",
        softdb={
            "RowAdam": make_step(RowAdam),
            "RowAdam, weight decay": make_step(RowAdam, weight_decay=0.01),
            "RowAdagrad": make_step(RowAdagrad),
        },
        peers={"SparseAdam": make_step(torch.optim.SparseAdam)},
        claims={("RowAdam", "SparseAdam"): 0.25},
    )


if __name__ == "__main__":
    main("row_optimizers", cases)
