"""Warnings about reads that cost more than another option would."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import softdb
from softdb import PerformanceWarning, SoftKVStore
from softdb.layers import ProductKeyMemory
from softdb.reading.hints import CostHints
from softdb.reading.reader import Reader, ToleranceRounds
from softdb.reading.tail import TailCosts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(rows: int, width: int = 64, **options: object) -> SoftKVStore:
    store = SoftKVStore(width, width, **options)  # type: ignore[arg-type]
    store.add(normal(rows, width), normal(rows, width, seed=1))
    return store


def test_a_large_dense_gradient_is_reported_once() -> None:
    store, query = make(10, trainable=True, capacity=2**17 + 1), normal(3, 64)
    with torch.no_grad():
        store.read(query, "topk", k=2)
    store.read(query)
    with pytest.warns(PerformanceWarning, match=r"16,777,344 numbers.*sparse_grad=True.*RowAdam") as said:
        store.read(query, "topk", k=2)
    assert said[0].filename == __file__
    store.read(query, "hard")  # Warnings are errors here.


@pytest.mark.parametrize("options", [{"sparse_grad": True, "trainable": True}, {}])
def test_gradients_that_are_sparse_or_not_needed_are_not_reported(options: dict[str, bool]) -> None:
    store = make(10, capacity=2**17 + 1, **options)
    store.read(normal(3, 64), "topk", k=2)
    make(10, trainable=True, capacity=2**17).read(normal(3, 64), "topk", k=2)  # 2**24 numbers


@pytest.mark.slow
def test_a_large_dense_gradient_of_a_layer_is_reported_once() -> None:
    layer = ProductKeyMemory(8, rows=4, key_dim=4, value_dim=2**22 + 1, k=2)
    with pytest.warns(PerformanceWarning, match=r"make the layer with sparse_grad=True"):
        layer.store.blend(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64))
    layer.store.blend(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64))


def test_candidates_that_cost_more_than_an_exact_read_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, query = make(100), normal(64, 64)
    store.read(query, "topk", k=50)  # It costs more, too, but not enough to be noticed.
    monkeypatch.setattr(Reader, "costs", TailCosts(candidate=1e5))
    with pytest.warns(PerformanceWarning, match=r'^k=50: .* times as much as the exact read .*mode="exact"'):
        store.read(query, "topk", k=50)
    store.read(query, "topk", k=50)


def test_a_sample_that_costs_more_than_an_exact_read_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, query = make(1000), normal(64, 64)
    monkeypatch.setattr(Reader, "costs", TailCosts(candidate=0.0, sample=1e9))
    with pytest.warns(PerformanceWarning, match=r"^tail_samples=100: "):
        store.read(query, "topk", k=4, tail_samples=100)
    store.read(query, "topk", k=4, tail_samples=100)


def test_a_tolerance_that_costs_more_than_an_exact_read_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, query = make(3000, 8, index="IVF16,Flat"), normal(4, 8)
    store.build_index()
    monkeypatch.setattr(Reader, "rounds", ToleranceRounds(candidates=16, samples=256))
    monkeypatch.setattr(Reader, "costs", TailCosts(max_trial_fraction=math.inf))
    store.read(query, "topk", tolerance=1e-6)  # All queries are read exactly, after a sample that costs little.
    monkeypatch.setattr(Reader, "costs", TailCosts(max_trial_fraction=math.inf, sample=1e9))
    with pytest.warns(PerformanceWarning, match=r"^tolerance=1e-06: "):
        assert (store.read(query, "topk", tolerance=1e-6).error == 0).all()
    store.read(query, "topk", tolerance=1e-6)


def test_small_waste_is_not_reported() -> None:
    hints = CostHints()
    hints.check_cost("k", 3, 2.0**24, 0.0)  # There is nothing to read.
    hints.check_cost("k", 3, 2.0**23 + 1.0, 1.0)
    with pytest.warns(PerformanceWarning, match="about 2.0 times"):
        hints.check_cost("k", 3, 2.0**24 + 1, 2.0**23)
    hints.check_cost("k", 4, 2.0**26, 2.0**23)


@pytest.mark.slow
def test_a_read_in_a_compiled_function_is_reported_where_it_is_called() -> None:
    store, query = make(10, trainable=True, capacity=2**17 + 1), normal(3, 64)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def read(query: Tensor) -> Tensor:
        return store.read(query, "topk", k=2).values

    with pytest.warns(PerformanceWarning, match="sparse_grad") as said:
        read(query)
    assert said[0].filename == __file__


@pytest.mark.parametrize("suffix", ["_app/train.py", "vision/models.py"])
def test_a_package_whose_name_starts_like_a_library_is_a_caller(suffix: str) -> None:
    library = Path(torch.__file__ if suffix.startswith("vision") else softdb.__file__).parent
    code = compile("hints.check_cost('k', 1, 2.0**24, 1.0)", f"{library}{suffix}", "exec")
    with pytest.warns(PerformanceWarning) as said:
        exec(code, {"hints": CostHints()})
    assert said[0].filename == f"{library}{suffix}"
