"""CUDA graphs capture reads, and their replays give the answers of eager reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from softdb import Read, SoftKVStore
from softdb.functional import soft_read
from softdb.layers import MemoryLayer, ProductKeyMemory

pytestmark = pytest.mark.gpu

READS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, k": {"k": 4},
    "topk": {"mode": "topk", "k": 8},
    "hard": {"mode": "hard"},
    "topk, mask": {"mode": "topk", "k": 8, "where": "mask"},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to("cuda")


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run twice on a side stream, as torch advises, then capture a run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()
    return graph, answer


def compare(found: Read, wanted: Read) -> None:
    for name in ("values", "ids", "weights", "scores", "lse", "mass"):
        mine, other = getattr(found, name), getattr(wanted, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("rows", [40, 20_000])
def test_a_captured_read_equals_an_eager_one(name: str, rows: int) -> None:
    store = SoftKVStore(32, 16, device="cuda", index="Flat", track_usage=True)
    ids = store.add(normal(rows, 32), normal(rows, 16, seed=1))
    options = dict(READS[name])
    if "where" in options:
        options["where"] = normal(rows, seed=2) > 0
    query = normal(64, 32, seed=3)
    graph, answer = capture(lambda: store.read(query, **options))
    for seed in (4, 5):
        query.copy_(normal(64, 32, seed=seed))
        graph.replay()
        compare(answer, store.read(query, **options))
        # An update stays in its slots, so that the next replay sees it.
        store.update(ids[:10], keys=2 * normal(10, 32, seed=seed + 10), values=normal(10, 16, seed=seed + 20))


@torch.no_grad()
def test_a_replay_counts_reads_and_records_nan() -> None:
    store = SoftKVStore(32, 16, device="cuda", index="Flat", track_usage=True)
    store.add(normal(1000, 32), normal(1000, 16, seed=1))
    query = normal(8, 32, seed=3)
    graph, answer = capture(lambda: store.read(query, "topk", k=4))
    store.reset_usage()
    graph.replay()
    graph.replay()
    assert int(store.usage.reads.sum()) == 2 * 8 * 4
    store.check()
    query[2, 0] = torch.nan
    graph.replay()
    assert answer.values[2].isnan().all()
    assert answer.values[3].isfinite().all()
    with pytest.raises(ValueError, match="query: expected finite numbers"):
        store.check()


@torch.no_grad()
def test_layers_and_attention_are_captured() -> None:
    torch.manual_seed(0)
    x = normal(4, 20, 16)
    heads = normal(2, 4, 50, 32)
    mask = torch.ones(50, 50, dtype=torch.bool, device="cuda").tril()
    runs: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda layer=layer: layer(x), x)  # type: ignore[misc]
        for layer in (
            MemoryLayer(16, 300, heads=2, key_dim=8).to("cuda"),
            MemoryLayer(16, 300, heads=2, key_dim=8, mode="topk", k=8, temperature="learnable").to("cuda"),
            ProductKeyMemory(16, 256, heads=2, key_dim=8, k=8).to("cuda"),
        )
    ]
    runs.append((lambda: soft_read(heads, heads, heads, mask=mask).values, heads))
    for run, given in runs:
        graph, answer = capture(run)
        given.copy_(torch.randn_like(given))
        graph.replay()
        torch.testing.assert_close(answer, run(), atol=1e-5, rtol=1e-4)


def test_a_training_step_of_attention_is_captured() -> None:
    leaves = [normal(2, 4, 50, 32, seed=seed).requires_grad_() for seed in range(3)]

    def run() -> tuple[Tensor, ...]:
        read = soft_read(*leaves)
        return torch.autograd.grad(read.values.sin().sum() + read.lse.sum(), leaves)

    graph, gradients = capture(run)
    with torch.no_grad():
        leaves[0].copy_(normal(2, 4, 50, 32, seed=7))
    graph.replay()
    for found, wanted in zip(gradients, run(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
