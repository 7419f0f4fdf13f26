"""Exact reads, compared with scaled_dot_product_attention and a naive softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from harness import Case, Contestant, Work, main, measure_peak_memory, wrap_no_grad
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import soft_read

# The naive read holds all scores several times, so it is left out above this number of scores.
MAX_NAIVE_SCORES = 1.5e8
# Size of a tile of scores that fits in the cache, at which the rate of the matrix product is measured.
TILE_QUERIES, TILE_SCORES = 1024, 2**20
# Number of queries whose values are compared with float64.
CHECKED_QUERIES = 16

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReadSize:
    """Sizes of a read of N rows with B queries, and its target ratios.

    Attributes:
        queries, rows: B and N.
        key_dim, value_dim: Widths of keys and values.
        dtype: The dtype of all operands.
        claims: Upper limits of the ratios of store.read, by peer or floor.
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


FORWARD_SIZES = [
    ReadSize(64, 100_000, claims={"sdpa": 0.82}),
    ReadSize(64, 1_000_000, claims={"sdpa": 0.95}),
    ReadSize(1024, 100_000, claims={"product floor": 1.25}),
    ReadSize(1, 1_000_000, claims={"sdpa": 0.50, "memory floor": 1.50}),
    ReadSize(8, 1_000_000, claims={"sdpa": 0.85}),
    ReadSize(256, 100_000, value_dim=256, claims={"sdpa": 0.45}),
    ReadSize(64, 1_000_000, dtype=torch.bfloat16, claims={"sdpa": 0.70}),
    ReadSize(512, 1_000_000, dtype=torch.bfloat16, claims={"sdpa": 0.70}),
]
BACKWARD_SIZES = [
    ReadSize(64, 100_000, claims={"sdpa": 0.78}),
    ReadSize(1024, 100_000, claims={"sdpa": 0.95}),
    ReadSize(1, 1_000_000),
    ReadSize(64, 1_000_000),
    ReadSize(256, 100_000, value_dim=256),
]
FROZEN_SIZES = [ReadSize(256, 100_000, claims={"sdpa": 0.55})]
MEMORY_SIZES = [ReadSize(1024, 1_000_000)]
SMALL_SIZES = [ReadSize(3, 500), ReadSize(2, 300, key_dim=8, value_dim=16), ReadSize(3, 200, dtype=torch.bfloat16)]


def cases(small: bool) -> Iterator[Case]:
    """Yield reads forward, with backward, with backward to the query only, and memory."""
    for size in SMALL_SIZES if small else FORWARD_SIZES:
        yield _make_forward_case(size)
    for size in SMALL_SIZES[:2] if small else BACKWARD_SIZES:
        yield _make_backward_case(size)
    for size in SMALL_SIZES[:1] if small else FROZEN_SIZES:
        yield _make_query_backward_case(size)
    for size in SMALL_SIZES[:1] if small else MEMORY_SIZES:
        yield _make_memory_case(size)


def _make_forward_case(size: ReadSize) -> Case:
    query, keys, values = _make_operands(size)
    store = _make_store(size, keys, values)

    def errors() -> dict[str, float]:
        checked = query[:CHECKED_QUERIES]
        wanted = _read_naively(checked.double(), keys.double(), values.double())
        with torch.no_grad():
            own, other = store.read(checked).values, _run_sdpa(checked, keys, values)
        return {"error / sdpa's": _compute_rms(own.double() - wanted) / _compute_rms(other.double() - wanted)}

    return Case(
        f"forward {size}",
        softdb={
            "soft_read": wrap_no_grad(lambda: soft_read(query, keys, values).values),
            "store.read": wrap_no_grad(lambda: store.read(query).values),
        },
        peers={name: wrap_no_grad(_bind(peer, query, keys, values)) for name, peer in _make_peers(size).items()},
        work=_compute_work(size, products=2),
        claims=_make_claims(size),
        facts=errors,
    )


def _make_backward_case(size: ReadSize) -> Case:
    """Make a case of forward and backward to the query, the keys and the values."""
    query, keys, values = (tensor.requires_grad_() for tensor in _make_operands(size))
    store = _make_store(size, keys.detach(), values.detach(), trainable=True)
    upstream = torch.randn(size.queries, size.value_dim)

    def gradients(attention: Attention, keys: Tensor, values: Tensor) -> Contestant:
        return lambda: torch.autograd.grad(attention(query, keys, values), (query, keys, values), upstream)

    return Case(
        f"forward + backward {size}",
        softdb={
            "soft_read": gradients(lambda *operands: soft_read(*operands).values, keys, values),
            "store.read": gradients(lambda query, *_: store.read(query).values, store.keys, store.values),
        },
        peers={name: gradients(attention, keys, values) for name, attention in _make_peers(size).items()},
        work=_compute_work(size, products=6),
        claims=_make_claims(size),
    )


def _make_query_backward_case(size: ReadSize) -> Case:
    """Make a case of frozen rows: forward, and backward to the query only."""
    query, keys, values = _make_operands(size)
    query.requires_grad_()
    store = _make_store(size, keys, values)
    upstream = torch.randn(size.queries, size.value_dim)

    def gradient(attention: Attention) -> Contestant:
        return lambda: torch.autograd.grad(attention(query, keys, values), query, upstream)

    return Case(
        f"forward + backward to the query {size}",
        softdb={
            "soft_read": gradient(lambda *operands: soft_read(*operands).values),
            "store.read": gradient(lambda query, *_: store.read(query).values),
        },
        peers={name: gradient(attention) for name, attention in _make_peers(size).items()},
        work=_compute_work(size, products=4),
        claims=_make_claims(size),
    )


def _make_memory_case(size: ReadSize) -> Case:
    """Make a case of the peak memory of a step beyond its results. Target: 64 MiB."""
    query, keys, values = (tensor.requires_grad_() for tensor in _make_operands(size))
    upstream = torch.randn(size.queries, size.value_dim)
    results: list[Tensor] = []

    def step() -> None:
        results.clear()
        output = soft_read(query, keys, values).values
        results.extend([output, *torch.autograd.grad(output, (query, keys, values), upstream)])

    def facts() -> dict[str, float]:
        results.clear()
        peak = measure_peak_memory(step)
        return {"MiB beyond the result": (peak - sum(tensor.nbytes for tensor in results)) / 2**20}

    return Case(
        f"memory of forward + backward {size}",
        softdb={"soft_read": step},
        peers={},
        work=_compute_work(size, 6),
        facts=facts,
    )


def _make_operands(size: ReadSize) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(size.queries, size.key_dim).to(size.dtype),
        torch.randn(size.rows, size.key_dim).to(size.dtype),
        torch.randn(size.rows, size.value_dim).to(size.dtype),
    )


def _make_store(size: ReadSize, keys: Tensor, values: Tensor, *, trainable: bool = False) -> SoftKVStore:
    store = SoftKVStore(size.key_dim, size.value_dim, trainable=trainable, dtype=size.dtype)
    store.reserve(size.rows)
    store.add(keys, values)
    return store


def _bind(attention: Attention, query: Tensor, keys: Tensor, values: Tensor) -> Contestant:
    return lambda: attention(query, keys, values)


def _make_peers(size: ReadSize) -> dict[str, Attention]:
    peers: dict[str, Attention] = {"sdpa": _run_sdpa}
    if size.queries * size.rows <= MAX_NAIVE_SCORES:
        peers["naive"] = _read_naively
    return peers


def _make_claims(size: ReadSize) -> dict[tuple[str, str], float]:
    return {("store.read", other): limit for other, limit in size.claims.items()}


def _run_sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    # The fused kernel requires the shape (batch, heads, n, width).
    return torch.nn.functional.scaled_dot_product_attention(query[None, None], keys[None, None], values[None, None])[
        0, 0
    ]


def _read_naively(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = query @ keys.T / math.sqrt(keys.shape[-1])
    weights = scores.softmax(-1)
    return weights @ values


def _compute_rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _compute_work(size: ReadSize, products: int) -> Work:
    # Forward has two products, the scores and the blend. If the weights were kept, backward would have two products for
    # each of them, or one if only the query needs a gradient. Backward reads the rows again and writes their gradients.
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
