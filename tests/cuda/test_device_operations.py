"""Test the main operations of a store on each device against a store in float64 on the CPU.

The first tests that ``scripts/gpu`` runs: a fault here explains others.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import merge, soft_read
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdam

ROWS, KEY_DIM, VALUE_DIM, QUERIES = 1000, 32, 16, 33
# Relative to the largest entry of what is compared: float32 on the device, float64 on the CPU.
TOLERANCE = 5e-5


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def make_stores(place: str, rows: int = ROWS, **options: Any) -> tuple[SoftKVStore, SoftKVStore]:
    """Make a store in float64 on the CPU and one in float32 on the device, with equal rows."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(rows, KEY_DIM, generator=generator), torch.randn(rows, VALUE_DIM, generator=generator)
    fields = {"time": torch.arange(rows)}
    reference = SoftKVStore.from_tensors(keys.double(), values.double(), fields=fields, **options)
    fields = {"time": fields["time"].to(place)}
    return reference, SoftKVStore.from_tensors(keys.to(place), values.to(place), fields=fields, **options)


def make_query(seed: int = 1, count: int = QUERIES) -> Tensor:
    return torch.randn(count, KEY_DIM, generator=torch.Generator().manual_seed(seed))


def check_close(found: Tensor, expected: Tensor, place: str, tolerance: float = TOLERANCE) -> None:
    assert found.device.type == place
    found, expected = (dense(tensor.detach()).cpu().double() for tensor in (found, expected))
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"expected an error of at most {tolerance}, got {float(error):.3g}"


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


@pytest.mark.parametrize("metric", ["dot", "scaled_dot", "cosine", "l2"])
@pytest.mark.parametrize("mode", ["exact", "exact, k", "topk", "hard"])
def test_values_lse_ids_and_gradients_equal_those_in_float64(place: str, mode: str, metric: str) -> None:
    name, _, has_k = mode.partition(", ")
    options = {"k": 8} if has_k or name == "topk" else {}
    stores = make_stores(place, metric=metric, trainable=True)
    query = make_query()
    queries = [query.double().requires_grad_(), query.to(place).requires_grad_()]
    expected, found = (store.read(query, name, **options) for store, query in zip(stores, queries, strict=True))
    for read in (expected, found):
        (read.values.square().sum() + read.lse.sum()).backward()
    check_close(found.values, expected.values, place)
    check_close(found.lse, expected.lse, place)
    check_close(queries[1].grad, queries[0].grad, place)
    check_close(stores[1].values.grad, stores[0].values.grad, place)
    check_close(stores[1].keys.grad, stores[0].keys.grad, place)
    if expected.ids is not None:
        assert torch.equal(found.ids.cpu(), expected.ids)
        check_close(found.weights, expected.weights, place)
        check_close(found.scores, expected.scores, place)


@pytest.mark.parametrize("mode", ["exact", "topk"])
def test_filters_hide_the_same_rows(place: str, mode: str) -> None:
    stores = make_stores(place)
    query = make_query(count=7)
    limit = torch.arange(100, 800, 100)
    exclude = torch.arange(21).view(7, 3)
    filters = [
        lambda place: {"where": torch.arange(0, ROWS, 3, device=place)},
        lambda place: {"where": torch.arange(ROWS, device=place) % 5 == 0},
        lambda place: {"where": lambda row: row["time"] > 250},
        lambda place: {"where": lambda row: row["time"] < limit.to(place)[:, None]},
        lambda place: {"exclude": exclude.to(place)},
    ]
    for options in filters:
        expected = stores[0].read(query.double(), mode, k=4, **options("cpu"))
        found = stores[1].read(query.to(place), mode, k=4, **options(place))
        check_close(found.values, expected.values, place)
        assert torch.equal(found.ids.cpu(), expected.ids)


@pytest.mark.parametrize("mode", ["exact", "topk"])
@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15", "straight_through"])
def test_normalizers_give_the_same_values(place: str, normalizer: str, mode: str) -> None:
    stores = make_stores(place)
    expected = stores[0].read(make_query().double(), mode, k=8, normalizer=normalizer)
    found = stores[1].read(make_query().to(place), mode, k=8, normalizer=normalizer)
    check_close(found.values, expected.values, place)


def test_gumbel_picks_one_row(place: str) -> None:
    _, store = make_stores(place)
    read = store.read(make_query().to(place), k=4, normalizer="gumbel")
    assert (read.values[:, None] == store.values).all(-1).any(-1).all()


def test_a_bias_by_row_is_added(place: str) -> None:
    stores = make_stores(place)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))
    expected = stores[0].read(make_query().double(), bias=bias.double())
    check_close(stores[1].read(make_query().to(place), bias=bias.to(place)).values, expected.values, place)


def test_tail_and_tolerance_are_within_their_error(place: str) -> None:
    _, store = make_stores(place)
    query = make_query().to(place)
    exact = store.read(query).values
    torch.manual_seed(3)
    for options in ({"k": 8, "tail_samples": 256}, {"tolerance": 0.1}):
        read = store.read(query, "topk", **options)
        error = (read.values - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.median() <= 3 * read.error.median() + 1e-4


def test_writes_evict_replace_and_delete_rows(place: str) -> None:
    store = SoftKVStore(8, 4, device=place, capacity=64, evict="lru", track_usage=True, fields=("time",))
    for step in range(5):
        ids = store.add(torch.randn(32, 8, device=place), torch.randn(32, 4, device=place), fields={"time": step})
        store.read(torch.randn(3, 8, device=place), "topk", k=4)
    assert ids.tolist() == list(range(128, 160))
    assert len(store) == 64
    key = torch.randn(3, 8, device=place)
    store.update(ids[:3], keys=key)
    store.delete(ids[3:5])
    assert len(store) == 62
    store.put(ids[3:4], torch.ones(1, 8, device=place), torch.ones(1, 4, device=place), fields={"time": 9})
    rows = store.get(ids[:4])
    assert rows.keys.device.type == place
    assert torch.equal(rows.keys[:3], key)
    assert rows.fields["time"].tolist() == [4, 4, 4, 9]


def test_a_filled_store_grows(place: str) -> None:
    store = SoftKVStore(8, 4, device=place, trainable=True)
    for _ in range(4):
        store.add(torch.randn(100, 8, device=place), torch.randn(100, 4, device=place))
    assert len(store) == 400
    best = store.read(store.keys.detach(), "hard", temperature=0.1)
    assert best.ids.shape == (len(store.keys), 1)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_training_with_row_adam_follows_float64(place: str, sparse_grad: bool) -> None:
    stores = make_stores(place, trainable=True, sparse_grad=sparse_grad)
    optimizers = [RowAdam(store.parameters(), lr=1e-2, weight_decay=0.1) for store in stores]
    for step in range(20):
        query = make_query(step, 16)
        for store, optimizer, own in zip(stores, optimizers, (query.double(), query.to(place)), strict=True):
            optimizer.zero_grad()
            store.read(own, "topk", k=4).values.square().mean().backward()
            optimizer.step()
    check_close(stores[1].keys, stores[0].keys, place, 1e-3)
    check_close(stores[1].values, stores[0].values, place, 1e-3)


def test_an_ivf_index_finds_the_rows_of_a_store(place: str) -> None:
    stores = make_stores(place, rows=5000, index="IVF16,Flat")
    exact = stores[0].read(make_query().double(), k=8).ids
    found = stores[1].read(make_query().to(place), "topk", k=8).ids.cpu()
    assert (found[..., None] == exact[:, None]).any(-1).double().mean() > 0.8


def test_merge_of_a_store_and_tensors_equals_one_read(place: str) -> None:
    reference, store = make_stores(place, trainable=True)
    query, extra = make_query(), make_query(5, 6)
    everything = [torch.cat([reference.keys, extra.double()]), torch.cat([reference.values, extra.double()[:, :16]])]
    expected = soft_read(query.double(), *everything)
    leaf = query.to(place).requires_grad_()
    found = merge([store.read(leaf), soft_read(leaf, extra.to(place), extra.to(place)[:, :16])])
    check_close(found.values, expected.values, place)
    found.values.sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_its_dtype_and_gradients(place: str, dtype: torch.dtype) -> None:
    reference, store = make_stores(place, trainable=True)
    with torch.autocast(place, dtype=dtype):
        values = store.read(make_query().to(place)).values
        values.float().square().sum().backward()
    assert values.dtype == dtype
    check_close(values.float(), reference.read(make_query().double()).values, place, 2e-2)
    assert store.keys.grad.isfinite().all()


def test_layers_run_forward_and_backward(place: str) -> None:
    for layer in (
        MemoryLayer(32, 256, device=place),
        ContextMemory(32, 64, device=place),
        ProductKeyMemory(32, 16 * 16, key_dim=32, device=place),
    ):
        for _ in range(2):
            layer(torch.randn(2, 16, 32, device=place)).square().mean().backward()
        assert all(parameter.grad is None or dense(parameter.grad).isfinite().all() for parameter in layer.parameters())


def test_snapshots_and_state_dicts_move_between_devices(place: str, tmp_path: Path) -> None:
    reference, store = make_stores(place, trainable=True)
    store.save(tmp_path / "rows")
    for other in ("cpu", place):
        loaded = SoftKVStore.load(tmp_path / "rows", device=other)
        assert torch.equal(loaded.keys.cpu(), store.keys.cpu())
        assert loaded.keys.device.type == other
    there = copy.deepcopy(store).to("cpu").to(place)
    assert torch.equal(there.values, store.values)
    copied = SoftKVStore(KEY_DIM, VALUE_DIM, trainable=True, fields=("time",), device="cpu")
    copied.load_state_dict(store.state_dict())
    check_close(copied.read(make_query()).values, reference.read(make_query().double()).values, "cpu")
