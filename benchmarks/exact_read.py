"""The exact read beside scaled_dot_product_attention and the three lines of torch that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from harness import Case, Contestant, Work, main, peak_memory, without_graph
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import soft_read

# Above this many scores the three lines, which hold all of them several times, are left out.
NAIVE_SCORES = 1.5e8
# A tile of scores that stays in cache: at this shape the rate of the matrix product is measured.
TILE_QUERIES, TILE_SCORES = 1024, 2**20
# So many queries are compared with float64.
CHECKED = 16

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Read:
    """How much is read, B queries over N rows, and what is promised of it.

    Attributes:
        queries, rows: B and N.
        key_dim, value_dim: The widths of keys and values.
        dtype: Of all operands.
        claims: The promised ratios of store.read, by peer or floor.
    """

    queries: int
    rows: int
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    claims: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        narrow = "" if self.dtype == torch.float32 else f", {self.dtype}".replace("torch.", "")
        return f"({self.queries}, {self.rows:,}), {self.key_dim}/{self.value_dim}{narrow}"


FORWARD = [
    Read(64, 100_000, claims={"sdpa": 0.82}),
    Read(64, 1_000_000, claims={"sdpa": 0.95}),
    Read(1024, 100_000, claims={"product floor": 1.25}),
    Read(1, 1_000_000, claims={"sdpa": 0.50, "memory floor": 1.50}),
    Read(8, 1_000_000, claims={"sdpa": 0.85}),
    Read(256, 100_000, value_dim=256, claims={"sdpa": 0.45}),
    Read(64, 1_000_000, dtype=torch.bfloat16, claims={"sdpa": 0.70}),
    Read(512, 1_000_000, dtype=torch.bfloat16, claims={"sdpa": 0.70}),
]
BACKWARD = [
    Read(64, 100_000, claims={"sdpa": 0.78}),
    Read(1024, 100_000, claims={"sdpa": 0.95}),
    Read(1, 1_000_000),
    Read(64, 1_000_000),
    Read(256, 100_000, value_dim=256),
]
FROZEN = [Read(256, 100_000, claims={"sdpa": 0.55})]
MEMORY = [Read(1024, 1_000_000)]
SMALL = [Read(3, 500), Read(2, 300, key_dim=8, value_dim=16), Read(3, 200, dtype=torch.bfloat16)]


def cases(small: bool) -> Iterator[Case]:
    """Every size forward, then forward and backward, to all operands and to the query alone; then the memory."""
    for size in SMALL if small else FORWARD:
        yield _forward(size)
    for size in SMALL[:2] if small else BACKWARD:
        yield _forward_and_backward(size)
    for size in SMALL[:1] if small else FROZEN:
        yield _backward_to_the_query(size)
    for size in SMALL[:1] if small else MEMORY:
        yield _memory(size)


def _forward(size: Read) -> Case:
    query, keys, values = _operands(size)
    store = _filled(size, keys, values)

    def errors() -> dict[str, float]:
        few = query[:CHECKED]
        wanted = _naive(few.double(), keys.double(), values.double())
        with torch.no_grad():
            own, other = store.read(few).values, _sdpa(few, keys, values)
        return {"error / sdpa's": _rms(own.double() - wanted) / _rms(other.double() - wanted)}

    return Case(
        f"forward {size}",
        softdb={
            "soft_read": without_graph(lambda: soft_read(query, keys, values).values),
            "store.read": without_graph(lambda: store.read(query).values),
        },
        peers={name: without_graph(_bound(peer, query, keys, values)) for name, peer in _peers(size).items()},
        work=_work(size, products=2),
        claims=_claims(size),
        facts=errors,
    )


def _forward_and_backward(size: Read) -> Case:
    """Gradients of the query, of every key and of every value."""
    query, keys, values = (tensor.requires_grad_() for tensor in _operands(size))
    store = _filled(size, keys.detach(), values.detach(), trainable=True)
    upstream = torch.randn(size.queries, size.value_dim)

    def gradients(attention: Attention, keys: Tensor, values: Tensor) -> Contestant:
        return lambda: torch.autograd.grad(attention(query, keys, values), (query, keys, values), upstream)

    return Case(
        f"forward + backward {size}",
        softdb={
            "soft_read": gradients(lambda *operands: soft_read(*operands).values, keys, values),
            "store.read": gradients(lambda query, *_: store.read(query).values, store.keys, store.values),
        },
        peers={name: gradients(attention, keys, values) for name, attention in _peers(size).items()},
        work=_work(size, products=6),
        claims=_claims(size),
    )


def _backward_to_the_query(size: Read) -> Case:
    """The rows are frozen: only the query wants a gradient."""
    query, keys, values = _operands(size)
    query.requires_grad_()
    store = _filled(size, keys, values)
    upstream = torch.randn(size.queries, size.value_dim)

    def gradient(attention: Attention) -> Contestant:
        return lambda: torch.autograd.grad(attention(query, keys, values), query, upstream)

    return Case(
        f"forward + backward to the query {size}",
        softdb={
            "soft_read": gradient(lambda *operands: soft_read(*operands).values),
            "store.read": gradient(lambda query, *_: store.read(query).values),
        },
        peers={name: gradient(attention) for name, attention in _peers(size).items()},
        work=_work(size, products=4),
        claims=_claims(size),
    )


def _memory(size: Read) -> Case:
    """What a step holds at its peak beyond its operands, its answer and their gradients; asked: 64 MiB."""
    query, keys, values = (tensor.requires_grad_() for tensor in _operands(size))
    upstream = torch.randn(size.queries, size.value_dim)
    kept: list[Tensor] = []

    def step() -> None:
        kept.clear()
        answer = soft_read(query, keys, values).values
        kept.extend([answer, *torch.autograd.grad(answer, (query, keys, values), upstream)])

    def facts() -> dict[str, float]:
        kept.clear()
        peak = peak_memory(step)
        return {"MiB beyond the result": (peak - sum(tensor.nbytes for tensor in kept)) / 2**20}

    return Case(
        f"memory of forward + backward {size}", softdb={"soft_read": step}, peers={}, work=_work(size, 6), facts=facts
    )


def _operands(size: Read) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(size.queries, size.key_dim).to(size.dtype),
        torch.randn(size.rows, size.key_dim).to(size.dtype),
        torch.randn(size.rows, size.value_dim).to(size.dtype),
    )


def _filled(size: Read, keys: Tensor, values: Tensor, *, trainable: bool = False) -> SoftKVStore:
    store = SoftKVStore(size.key_dim, size.value_dim, trainable=trainable, dtype=size.dtype)
    store.reserve(size.rows)
    store.add(keys, values)
    return store


def _bound(attention: Attention, query: Tensor, keys: Tensor, values: Tensor) -> Contestant:
    return lambda: attention(query, keys, values)


def _peers(size: Read) -> dict[str, Attention]:
    peers: dict[str, Attention] = {"sdpa": _sdpa}
    if size.queries * size.rows <= NAIVE_SCORES:
        peers["naive"] = _naive
    return peers


def _claims(size: Read) -> dict[tuple[str, str], float]:
    return {("store.read", other): limit for other, limit in size.claims.items()}


def _sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    # Its fast kernel wants (batch, heads, n, width).
    return torch.nn.functional.scaled_dot_product_attention(query[None, None], keys[None, None], values[None, None])[
        0, 0
    ]


def _naive(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = query @ keys.T / math.sqrt(keys.shape[-1])
    weights = scores.softmax(-1)
    return weights @ values


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _work(size: Read, products: int) -> Work:
    # Forward is two products, scores and blend. Backward is two for each, if the weights could be kept, or one for each
    # where only the query wants a gradient; the rows then come from memory a second time, and their gradients go there.
    operations = products * size.queries * size.rows * (size.key_dim + size.value_dim)
    table = size.dtype.itemsize * size.rows * (size.key_dim + size.value_dim)
    tile = min(size.queries, TILE_QUERIES)
    return Work(
        operations=operations,
        bytes=products / 2 * table,
        product=(tile, size.key_dim, min(size.rows, TILE_SCORES // tile)),
    )


if __name__ == "__main__":
    main("exact_read", cases)
