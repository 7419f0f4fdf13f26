"""`softdb.lab` takes stores, layers, queries and targets on each device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softdb import SoftKVStore, lab
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def make_store(device: torch.device, **options: Any) -> SoftKVStore:
    return SoftKVStore.from_tensors(normal(60, 8).to(device), normal(60, 3, seed=1).to(device), **options)


def test_comparisons_equal_those_on_the_cpu(device: torch.device) -> None:
    tables = []
    for place in (device, torch.device("cpu")):
        store, queries = make_store(place, trainable=True), normal(20, 8, seed=2).to(place)
        found = []
        for targets in (None, torch.arange(20, device=place) % 3, normal(20, 3, seed=3).to(place)):
            found.append(lab.compare(store, queries, ks=(4,), temperatures=(1.0, 0.1), targets=targets))
        rows = [[(row.distance, row.agreement, row.mass) for row in one.settings] for one in found]
        gradients = lab.compare_gradients(store, queries, lambda values: values.square().mean(), temperatures=(1.0,))
        assert gradients.table()
        tables.append(torch.tensor(rows, device="cpu"))
    torch.testing.assert_close(tables[0], tables[1], atol=1e-4, rtol=1e-3, equal_nan=True)


def test_an_explanation_equals_that_on_the_cpu(device: torch.device) -> None:
    texts = []
    for place in (device, torch.device("cpu")):
        store = make_store(place)
        texts.append(lab.explain(store, normal(3, 8, seed=2).to(place), labels=[f"row {n}" for n in range(60)]).table())
    assert texts[0] == texts[1]


def test_layers_are_explained(device: torch.device) -> None:
    torch.manual_seed(0)
    for layer in (
        MemoryLayer(8, 50, heads=2, key_dim=8),
        MemoryLayer(8, 50, heads=2, key_dim=8, mode="topk", k=4),
        ProductKeyMemory(8, 64, heads=2, key_dim=8, k=4),
    ):
        assert lab.explain(layer.to(device), normal(3, 8).to(device), head=1).table()
    for k in (None, 4):
        context = ContextMemory(8, rows=20, heads=2, key_dim=8, k=k).to(device)
        context(normal(2, 6, 8).to(device))
        assert lab.explain(context, normal(3, 8, seed=1).to(device), head=1, sequence=1).table()


def test_usage_is_summarized(device: torch.device) -> None:
    store = make_store(device, track_usage=True)
    store.read(normal(5, 8, seed=2).to(device), "topk", k=4)
    assert int(lab.summarize_usage(store).reads.sum()) == 20
    layer = MemoryLayer(8, 50, heads=2, key_dim=8, mode="topk", k=4, track_usage=True).to(device)
    layer(normal(5, 8).to(device))
    assert lab.summarize_usage(layer).table()


def test_a_page_is_written(device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from softdb.lab.page import write_page

    write_page(tmp_path / "page.html", make_store(device), normal(4, 8, seed=2).to(device))
    assert (tmp_path / "page.html").stat().st_size > 1000
