"""Test reads under activation checkpointing, which computes them again in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tolerances import allclose, assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import softdb
from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdam

pytestmark = pytest.mark.each_device

EXACT: dict[str, Any] = {}
TOPK: dict[str, Any] = {"mode": "topk", "k": 3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def make_store(rows: int = 30, **options: Any) -> SoftKVStore:
    store = SoftKVStore(8, 3, **({"trainable": True} | options))
    store.reserve(2 * rows + 4)
    store.add(torch.randn(rows, 8), torch.randn(rows, 3))
    return store


@pytest.mark.slow
@pytest.mark.parametrize(("how", "compiled"), [(EXACT, None), (TOPK, None), (TOPK, "inside"), (TOPK, "outside")])
def test_checkpointed_reads_equal_plain_reads_and_raise_after_an_addition(
    how: dict[str, Any], compiled: str | None
) -> None:
    store, encoder = make_store(), nn.Linear(8, 8)

    def read(x: Tensor) -> Tensor:
        return store(encoder(x), **how).sin()

    def repeat(function: Any) -> Any:
        return lambda x: checkpoint(function, x, use_reentrant=False)

    def compile_(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    run = {None: repeat(read), "inside": compile_(repeat(read)), "outside": repeat(compile_(read))}[compiled]
    x = torch.randn(4, 8)
    leaves = (store.keys, store.values, encoder.weight)
    expected = torch.autograd.grad(read(x).sum(), leaves)
    for actual, gradient in zip(torch.autograd.grad(run(x).sum(), leaves), expected, strict=True):
        assert_close(actual.to_dense(), gradient.to_dense())
    answer = run(x).sum()
    store.add(torch.randn(1, 8), torch.randn(1, 3))
    with pytest.raises(softdb.StaleReadError, match="activation checkpointing"):
        answer.backward()


@pytest.mark.parametrize("how", [{"mode": "topk", "k": 5}, {"mode": "hard"}], ids=lambda how: str(how["mode"]))
def test_training_with_and_without_checkpointing_ends_with_the_same_rows(how: dict[str, Any]) -> None:
    found = []
    for is_repeated in (False, True):
        torch.manual_seed(0)
        store, encoder = make_store(300, index=IndexConfig("IVF8,Flat", recall=1.0)), nn.Linear(8, 8)
        nn.init.eye_(encoder.weight)
        nn.init.zeros_(encoder.bias)
        optimizer = RowAdam(store.parameters(), lr=0.1)

        def answer(query: Tensor, store: SoftKVStore = store, encoder: nn.Linear = encoder) -> Tensor:
            return store(encoder(query), **how)

        for _ in range(4):
            optimizer.zero_grad()
            query = torch.randn(16, 8)
            values = checkpoint(answer, query, use_reentrant=False) if is_repeated else answer(query)
            (values - 1).square().sum().backward()
            optimizer.step()
        found.append(store.values.detach())
    assert allclose(*found, atol=1e-6)


def test_draws_are_repeated_or_refused() -> None:
    store = make_store()
    query = torch.randn(4, 8)

    def gradient(generator: torch.Generator | None, repeat: bool) -> Tensor:
        def loss(query: Tensor) -> Tensor:
            return store.read(query, normalizer="gumbel", generator=generator).values.square().sum()

        torch.manual_seed(3)
        leaf = query.clone().requires_grad_()
        (checkpoint(loss, leaf, use_reentrant=False) if repeat else loss(leaf)).backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(None, True), gradient(None, False))
    with pytest.raises(softdb.ArgumentError, match="generator: expected None under activation checkpointing"):
        gradient(torch.Generator(), True)


def test_repeated_reads_are_counted_again() -> None:
    store = SoftKVStore(8, 3, capacity=4, evict="lru", track_usage=True, trainable=True)
    store.add(torch.randn(4, 8), torch.randn(4, 3))
    query = torch.ones(3, 8, requires_grad=True)
    values = checkpoint(lambda x: store.read(x, "topk", k=4).values.sin(), query, use_reentrant=False)
    assert store.usage.reads.tolist() == [3] * 4
    values.sum().backward()
    assert store.usage.reads.tolist() == [6] * 4
    assert store.usage.weight.sum().item() == pytest.approx(6)
