"""The exact read beside scaled_dot_product_attention and the three lines of torch that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import Case, Work, main
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import soft_read

# Above this many scores the three lines, which hold all of them several times, are left out.
NAIVE_SCORES = 1.5e8
# A tile of scores that stays in cache: at this shape the rate of the matrix product is measured.
TILE_QUERIES, TILE_SCORES = 256, 2**19

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """How much is read: B queries, N rows, the widths of keys and values."""

    queries: int
    rows: int
    key_dim: int = 64
    value_dim: int = 64

    def __str__(self) -> str:
        return f"({self.queries}, {self.rows:,}), {self.key_dim}/{self.value_dim}"


SIZES = [
    Size(64, 100_000),
    Size(1024, 100_000),
    Size(1, 1_000_000),
    Size(64, 1_000_000),
    Size(256, 100_000, value_dim=256),
]
SMALL_SIZES = [Size(3, 500), Size(2, 300, key_dim=8, value_dim=16)]


def cases(small: bool) -> Iterator[Case]:
    """Every size forward, then every size forward and backward."""
    for size in SMALL_SIZES if small else SIZES:
        yield _forward(size)
    for size in SMALL_SIZES if small else SIZES:
        yield _forward_and_backward(size)


def _forward(size: Size) -> Case:
    query, keys, values = _operands(size)
    store = SoftKVStore(size.key_dim, size.value_dim)
    store.reserve(size.rows)
    store.add(keys, values)
    return Case(
        f"forward {size}",
        softdb={
            "soft_read": lambda: soft_read(query, keys, values).values,
            "store.read": lambda: store.read(query).values,
        },
        peers={name: _bound(attention, query, keys, values) for name, attention in _peers(size).items()},
        work=_work(size, backward=False),
    )


def _forward_and_backward(size: Size) -> Case:
    """Gradients of the query, of every key and of every value."""
    query, keys, values = (tensor.requires_grad_() for tensor in _operands(size))
    store = SoftKVStore(size.key_dim, size.value_dim, trainable=True)
    store.reserve(size.rows)
    store.add(keys.detach(), values.detach())
    upstream = torch.randn(size.queries, size.value_dim)

    def gradients(attention: Attention, keys: Tensor, values: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(attention(query, keys, values), (query, keys, values), upstream)

    return Case(
        f"forward + backward {size}",
        softdb={
            "soft_read": gradients(lambda *operands: soft_read(*operands).values, keys, values),
            "store.read": gradients(lambda query, *_: store.read(query).values, store.keys, store.values),
        },
        peers={name: gradients(attention, keys, values) for name, attention in _peers(size).items()},
        work=_work(size, backward=True),
    )


def _operands(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(size.queries, size.key_dim),
        torch.randn(size.rows, size.key_dim),
        torch.randn(size.rows, size.value_dim),
    )


def _bound(attention: Attention, query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
    return lambda: attention(query, keys, values)


def _peers(size: Size) -> dict[str, Attention]:
    peers: dict[str, Attention] = {"sdpa": _sdpa}
    if size.queries * size.rows <= NAIVE_SCORES:
        peers["naive"] = _naive
    return peers


def _sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    # Its fast kernel wants (batch, heads, n, width).
    return torch.nn.functional.scaled_dot_product_attention(query[None, None], keys[None, None], values[None, None])[
        0, 0
    ]


def _naive(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = query @ keys.T / math.sqrt(keys.shape[-1])
    weights = scores.softmax(-1)
    return weights @ values


def _work(size: Size, *, backward: bool) -> Work:
    # Forward is two products, scores and blend. Backward is two for each, if the weights could be kept; the rows then
    # come from memory a second time, and their gradients go there.
    operations = 2 * size.queries * size.rows * (size.key_dim + size.value_dim)
    table = 4 * size.rows * (size.key_dim + size.value_dim)
    tile = min(size.queries, TILE_QUERIES)
    return Work(
        operations=3 * operations if backward else operations,
        bytes=3 * table if backward else table,
        product=(tile, size.key_dim, min(size.rows, TILE_SCORES // tile)),
    )


if __name__ == "__main__":
    main("exact_read", cases)
