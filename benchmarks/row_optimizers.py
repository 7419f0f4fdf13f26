"""A step of an optimiser that moves the rows that a gradient names, beside torch's SparseAdam."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from harness import Case, Contestant, main
from torch import nn

from softdb.optim import RowAdagrad, RowAdam

WIDTH = 64
# Different rows at each step: the same ones would lie in the cache.
GRADIENTS = 16


def cases(small: bool) -> Iterator[Case]:
    """8,192 of a million rows."""
    yield _steps(1_000 if small else 1_000_000, 32 if small else 8192)


def _steps(rows: int, touched: int) -> Case:
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

    def steps(kind: type[torch.optim.Optimizer], **options: Any) -> Contestant:
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
            "RowAdam": steps(RowAdam),
            "RowAdam, weight decay": steps(RowAdam, weight_decay=0.01),
            "RowAdagrad": steps(RowAdagrad),
        },
        peers={"SparseAdam": steps(torch.optim.SparseAdam)},
        claims={("RowAdam", "SparseAdam"): 0.25},
    )


if __name__ == "__main__":
    main("row_optimizers", cases)
