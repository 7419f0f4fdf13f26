"""Reads so small that what surrounds the arithmetic counts, beside the three lines of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from harness import Case, Contestant, main, without_graph
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import soft_read

WIDTH = 64


def cases(small: bool) -> Iterator[Case]:
    """One query over 64 rows forward; 32 over 1,024 forward and backward."""
    yield _forward(1, 16 if small else 64)
    yield _forward_and_backward(2 if small else 32, 32 if small else 1024)


def _operands(queries: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(queries, WIDTH), torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)


def _naive(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(query @ keys.T / math.sqrt(WIDTH), dim=-1) @ values


def _forward(queries: int, rows: int) -> Case:
    query, keys, values = _operands(queries, rows)
    store = SoftKVStore(WIDTH, WIDTH)
    store.add(keys, values)

    return Case(
        f"forward ({queries}, {rows:,}), {WIDTH}/{WIDTH}; asked: the naive time and 60 µs",
        softdb={
            "soft_read": without_graph(lambda: soft_read(query, keys, values)),
            "store.read": without_graph(lambda: store.read(query)),
        },
        peers={"naive": without_graph(lambda: _naive(query, keys, values))},
    )


def _forward_and_backward(queries: int, rows: int) -> Case:
    query, keys, values = (tensor.requires_grad_() for tensor in _operands(queries, rows))
    store = SoftKVStore(WIDTH, WIDTH, trainable=True)
    store.reserve(rows)
    store.add(keys.detach(), values.detach())
    upstream = torch.randn(queries, WIDTH)

    def gradients(read: Callable[[], Tensor], keys: Tensor, values: Tensor) -> Contestant:
        return lambda: torch.autograd.grad(read(), (query, keys, values), upstream)

    return Case(
        f"forward + backward ({queries}, {rows:,}), {WIDTH}/{WIDTH}",
        softdb={
            "soft_read": gradients(lambda: soft_read(query, keys, values).values, keys, values),
            "store.read": gradients(lambda: store.read(query).values, store.keys, store.values),
        },
        peers={"naive": gradients(lambda: _naive(query, keys, values), keys, values)},
        claims={("soft_read", "naive"): 1.40, ("store.read", "naive"): 1.40},
    )


if __name__ == "__main__":
    main("small_reads", cases)
