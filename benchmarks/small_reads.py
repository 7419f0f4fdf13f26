"""Small reads, whose time is mostly overhead, compared with a naive softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from harness import Case, Contestant, main, wrap_no_grad
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import soft_read

WIDTH = 64


def cases(small: bool) -> Iterator[Case]:
    """Yield a forward case of one query and a case of 32 queries with backward."""
    yield _make_forward_case(1, 16 if small else 64)
    yield _make_backward_case(2 if small else 32, 32 if small else 1024)


def _make_operands(queries: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(queries, WIDTH), torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)


def _read_naively(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(query @ keys.T / math.sqrt(WIDTH), dim=-1) @ values


def _make_forward_case(queries: int, rows: int) -> Case:
    query, keys, values = _make_operands(queries, rows)
    store = SoftKVStore(WIDTH, WIDTH)
    store.add(keys, values)

    return Case(
        f"forward ({queries}, {rows:,}), {WIDTH}/{WIDTH}; asked: the naive time and 60 µs",
        softdb={
            "soft_read": wrap_no_grad(lambda: soft_read(query, keys, values)),
            "store.read": wrap_no_grad(lambda: store.read(query)),
        },
        peers={"naive": wrap_no_grad(lambda: _read_naively(query, keys, values))},
    )


def _make_backward_case(queries: int, rows: int) -> Case:
    query, keys, values = (tensor.requires_grad_() for tensor in _make_operands(queries, rows))
    store = SoftKVStore(WIDTH, WIDTH, trainable=True, sparse_grad=True)
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
        peers={"naive": gradients(lambda: _read_naively(query, keys, values), keys, values)},
        claims={("soft_read", "naive"): 1.40, ("store.read", "naive"): 1.40},
    )


if __name__ == "__main__":
    main("small_reads", cases)
