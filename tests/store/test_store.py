"""Reads and rows of a SoftKVStore, and its behavior as a module."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from support import reference
from support.contract import (
    DISPATCH,
    METRICS,
    Problem,
    ReadContract,
    TiledReadContract,
    force_dispatch,
)
from support.tolerances import allclose, largest_error
from torch import Tensor, nn

import softdb
from softdb import SoftKVStore
from softdb.layers import MemoryLayer
from softdb.scoring.normalizers import NORMALIZERS, SPARSE_NORMALIZERS, is_random
from softdb.table.table import Table

pytestmark = pytest.mark.each_device


def visible_rule(visible: Tensor | None):  # type: ignore[no-untyped-def]
    """A `where` for a (B, N) mask over rows whose ids are their numbers."""
    if visible is None:
        return None

    def where(row):  # type: ignore[no-untyped-def]
        ids = row["id"]
        if ids.dim() == 1:
            return visible[:, ids]
        return visible.gather(1, ids.clamp(min=0)) & (ids >= 0)

    return where


def store_of(problem: Problem, **options: object) -> SoftKVStore:
    """A store of the problem's rows, their ids their numbers."""
    store = SoftKVStore(
        problem.keys.shape[1], problem.values.shape[1], metric=problem.metric, dtype=problem.keys.dtype, **options
    )
    store.add(problem.keys, problem.values)
    return store


class StoreContract(ReadContract):
    options: dict[str, object] = {}
    how: dict[str, object] = {}

    def prepare(self, problem: Problem) -> SoftKVStore:
        return store_of(problem, **self.options)

    def read(self, problem: Problem) -> tuple[softdb.Read, dict[str, Tensor]]:
        store = self.prepare(problem)
        how = dict(self.how)
        if how.get("mode") == "topk":
            how["k"] = max(1, len(problem.keys) + 2)
        read = store.read(problem.query, temperature=problem.temperature, where=visible_rule(problem.visible), **how)
        leaves = {"query": problem.query, "temperature": problem.temperature}
        return read, leaves | {"keys": store.keys, "values": store.values}


class TestExact(StoreContract):
    options = {"trainable": True}


@pytest.mark.slow
class TestExactOverBuffers(StoreContract):
    gradients = ("query", "temperature")


@pytest.mark.slow
class TestExactWithBestRows(StoreContract):
    options = {"trainable": True}
    how = {"k": 7}


@pytest.mark.slow
class TestExactInSmallTiles(TiledReadContract, TestExact):
    """In blocks, with the bound that the store keeps."""

    @pytest.fixture(autouse=True, params=list(DISPATCH)[::3])
    def _dispatch(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        force_dispatch(request.param, monkeypatch)


@pytest.mark.slow
class TestTopkOfAllRows(StoreContract):
    options = {"trainable": True}
    how = {"mode": "topk"}


@pytest.mark.slow
class TestTopkOfAllRowsThroughFaiss(StoreContract):
    options = {"trainable": True, "index": "IVF1,Flat"}
    how = {"mode": "topk"}


@pytest.mark.slow
class TestTopkOverBuffers(StoreContract):
    gradients = ("query", "temperature")
    how = {"mode": "topk"}


@pytest.mark.slow
class TestExactAmongHoles(StoreContract):
    """Rows lie between deleted ones, and in slots that were used before."""

    gradients = ("query", "temperature")

    def prepare(self, problem: Problem) -> SoftKVStore:
        count = len(problem.keys)
        store = SoftKVStore(*(t.shape[1] for t in (problem.keys, problem.values)), metric=problem.metric,
                            dtype=problem.keys.dtype)  # fmt: skip
        filler = torch.arange(1000, 1000 + count + 9)
        store.add(torch.randn(count + 9, store.key_dim), torch.randn(count + 9, store.value_dim), ids=filler)
        store.delete(filler[::2])
        store.add(problem.keys, problem.values, ids=torch.arange(count))
        store.delete(filler[1::2])
        return store


@pytest.mark.slow
class TestExactAmongHolesInSmallTiles(TiledReadContract, TestExactAmongHoles):
    @pytest.fixture(
        autouse=True, params=["tiny tiles", "two partitions", "five partitions, always shifted, rows first"]
    )
    def _dispatch(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        force_dispatch(request.param, monkeypatch)


# -- which rows a read returns ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 5, 70])
def test_topk_reads_the_best_rows_and_no_others(metric: str, k: int) -> None:
    problem = Problem.random(rows=5000, metric=metric)
    store = store_of(problem, trainable=True, sparse_grad=True)
    read = store.read(problem.query, "topk", k=k)
    wide = problem.to(torch.float64)
    scores = reference.scores(wide.query, wide.keys, metric)
    ids = reference.best(scores, k)
    assert (read.ids == ids).all()
    visible = torch.zeros(5, 5000, dtype=torch.bool).scatter_(1, ids, True)
    answer = reference.read(wide.query, wide.keys, wide.values, metric=metric, visible=visible)
    assert largest_error(read.values, answer.values) < 1e-5
    assert largest_error(read.lse, answer.lse) < 1e-4
    assert largest_error(read.weights, answer.weights.gather(1, ids)) < 1e-5
    assert largest_error(read.scores, scores.gather(1, ids)) < 1e-4
    assert read.mass.isnan().all()
    grads = torch.autograd.grad(read.values.square().sum(), [store.keys, store.values])
    answer.values.square().sum().backward()
    for name, grad in zip(("keys", "values"), grads, strict=True):
        assert grad.layout == torch.sparse_coo
        assert grad.is_coalesced() or store.device.type != "cpu"  # A GPU would wait for the number of rows.
        assert set(grad.coalesce().indices()[0].tolist()) == set(ids.flatten().tolist())
        assert largest_error(grad.to_dense(), getattr(wide, name).grad) < 1e-5


@pytest.mark.parametrize("metric", METRICS)
def test_hard_reads_the_best_row(metric: str) -> None:
    problem = Problem.random(rows=400, metric=metric)
    store = store_of(problem, trainable=True)
    read = store.read(problem.query, "hard")
    wide = problem.to(torch.float64)
    scores = reference.scores(wide.query, wide.keys, metric)
    best = scores.argmax(-1)
    assert (read.ids[:, 0] == best).all()
    assert (read.values == problem.values[best]).all()
    assert (read.weights == 1).all()
    assert largest_error(read.lse, scores.amax(-1)) < 1e-5
    assert read.mass.isnan().all()
    grads = torch.autograd.grad(read.values.sum(), [problem.query, store.keys, store.values], retain_graph=True)
    assert (grads[0] == 0).all()
    assert (grads[1].to_dense() == 0).all()
    wanted = torch.zeros_like(store.values).index_add_(0, best, torch.ones(5, 3))
    assert (grads[2].to_dense() == wanted).all()
    (through_lse,) = torch.autograd.grad(read.lse.sum(), problem.query)
    (wanted,) = torch.autograd.grad(scores.amax(-1).sum(), wide.query)
    assert largest_error(through_lse, wanted) < 1e-5


@pytest.mark.parametrize("mode", ["exact", "topk"])
def test_straight_through(mode: str) -> None:
    problem = Problem.random(rows=50, dtype=torch.float64)
    store = store_of(problem, trainable=True)
    how = {"mode": mode, "k": 50}
    hard = store.read(problem.query, normalizer="straight_through", **how)
    soft = store.read(problem.query, **how)
    assert (hard.values == store.read(problem.query, "hard").values).all()
    assert (hard.weights[:, 0] == 1).all()
    assert (hard.weights[:, 1:] == 0).all()
    leaves = [problem.query, store.keys, store.values]
    ours, others = (torch.autograd.grad(read.values.sum(), leaves) for read in (hard, soft))
    for mine, wanted in zip(ours, others, strict=True):
        assert allclose(mine.to_dense(), wanted.to_dense())
    assert (hard.lse == soft.lse).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_other_normalizers_read_alike_in_both_modes(normalizer: str) -> None:
    problem = Problem.random(rows=50, dtype=torch.float64)
    store = store_of(problem, trainable=True)
    store.delete([3, 7])
    leaves = [problem.query, store.keys, store.values]

    def read(**how: object) -> tuple[softdb.Read, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(1) if is_random(normalizer) else None
        found = store.read(
            problem.query, normalizer=normalizer, generator=generator, where=lambda row: row["id"] != 9, **how
        )
        gradients = torch.autograd.grad(found.values.square().sum() + found.lse.sum(), leaves)
        return found, tuple(gradient.to_dense() for gradient in gradients)

    exact, wanted = read(k=50)
    topk, ours = read(mode="topk", k=50)
    assert allclose(exact.values, topk.values)
    assert torch.equal(exact.ids, topk.ids)
    assert not torch.isin(torch.tensor([3, 7, 9]), exact.ids).any()
    assert allclose(exact.weights, topk.weights)
    assert allclose(exact.lse, topk.lse)
    assert (topk.mass == 1).all()
    for mine, other in zip(ours, wanted, strict=True):
        assert allclose(mine, other)
    assert exact.normalizer == topk.normalizer == normalizer


def test_mass_is_one_if_the_candidates_hold_all_sparse_weight() -> None:
    problem = Problem.random(rows=2000)
    store = store_of(problem)
    support = (SPARSE_NORMALIZERS["sparsemax"](problem.answer().scores) > 0).sum(-1)
    assert int(support.min()) < int(support.max())
    exact = store.read(problem.query, normalizer="sparsemax").values
    for k in (1, 2, int(support.max()), int(support.max()) + 1, 100):
        read = store.read(problem.query, "topk", k=k, normalizer="sparsemax")
        assert (read.mass == 1).all()
        assert allclose(read.values, exact, atol=1e-6)
        assert torch.equal((read.weights > 0).sum(-1), support)
        assert read.ids.shape[-1] >= max(k, int(support.max()))
        assert read.ids.shape[-1] <= max(k, 2 * int(support.max()))
    wide = store.read(problem.query, "topk", k=1, normalizer="entmax15", temperature=100.0)  # of all 2,000 rows
    assert wide.mass.isnan().all()
    assert wide.ids.shape[-1] == 1024


@pytest.mark.parametrize("normalizer", SPARSE_NORMALIZERS)
def test_candidates_are_doubled_until_they_hold_all_sparse_weight(normalizer: str) -> None:
    torch.manual_seed(0)
    index = softdb.IndexConfig("IVF32,Flat", recall=1.0)
    store = SoftKVStore(8, 3, trainable=True, index=index, dtype=torch.float64)
    store.add(torch.randn(3000, 8), torch.randn(3000, 3))
    query = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    how = dict(where=lambda row: row["id"] % 7 != torch.arange(10).unsqueeze(-1) % 7, normalizer=normalizer)
    exact, read = store.read(query, **how), store.read(query, "topk", k=2, **how)
    assert ((read.mass == 1) | read.mass.isnan()).all()  # unknown where the search was approximate
    assert ((read.weights == 0).any(-1)).all()
    coarse = SoftKVStore(8, 3, index=softdb.IndexConfig("IVF32,Flat", recall=0.3), dtype=torch.float64)
    coarse.add(store.keys.detach(), store.values.detach())
    found = coarse.read(query, "topk", k=2, **how)
    assert found.mass.isnan().any()
    assert largest_error(found.values[found.mass == 1], exact.values[found.mass == 1]) < 1e-9
    assert largest_error(read.values, exact.values) < 1e-9
    for mine, other in zip(
        torch.autograd.grad(read.values.sin().sum(), (query, store.keys, store.values)),
        torch.autograd.grad(exact.values.sin().sum(), (query, store.keys, store.values)),
        strict=True,
    ):
        assert largest_error(mine.to_dense(), other.to_dense()) < 1e-8


@pytest.mark.parametrize("mode", ["exact", "topk", "hard"])
@pytest.mark.parametrize("rows", [3, 33, 65, 127, 5001, 20_003])
@pytest.mark.parametrize("width", [1, 8, 64])
def test_equal_rows_tie(mode: str, width: int, rows: int) -> None:
    torch.manual_seed(0)
    how = {} if mode == "hard" else {"k": 1}
    for metric in ("scaled_dot", "cosine"):
        store = SoftKVStore(width, 1, metric=metric)
        store.add(torch.randn(1, width).expand(rows, width), torch.arange(float(rows))[:, None])
        for queries in (1, 1, 1, 1, 2, 6, 16):
            assert (store.read(torch.randn(queries, width), mode, **how).ids == 0).all()


@pytest.mark.parametrize("mode", ["exact", "topk", "hard"])
def test_ties_go_to_the_lowest_slot(mode: str) -> None:
    store = SoftKVStore(4, 1)
    store.add(torch.ones(3000, 4), torch.arange(3000.0)[:, None])
    store.delete(torch.arange(5))
    how = {} if mode == "hard" else {"k": 33}
    read = store.read(torch.ones(2, 4), mode, **how)
    wanted = torch.arange(5, 6 if mode == "hard" else 38)
    assert (read.ids == wanted).all()


@pytest.mark.parametrize("mode", ["exact", "topk"])
def test_padding_where_there_are_fewer_rows_than_k(mode: str) -> None:
    store = SoftKVStore(4, 2)
    store.add(torch.randn(3, 4), torch.randn(3, 2), ids=torch.tensor([7, 5, 9]))
    read = store.read(torch.randn(2, 4), mode, k=6)
    assert read.ids.shape == (2, 6)
    assert (read.ids[:, 3:] == -1).all()
    assert (read.ids[:, :3].sort().values == torch.tensor([5, 7, 9])).all()
    assert (read.weights[:, 3:] == 0).all()
    assert (read.scores[:, 3:] == -math.inf).all()
    assert allclose(read.mass, torch.ones(2))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_read_before_the_first_row_has_gradients_of_zero(sparse_grad: bool, normalizer: str) -> None:
    store, query = SoftKVStore(3, 2, trainable=True, sparse_grad=sparse_grad), torch.ones(2, 3)
    with torch.no_grad():
        assert not store.read(query, "topk", k=2).values.requires_grad
    read = store.read(query, "topk", k=2, normalizer=normalizer)
    (read.values.sum() + read.weights.sum()).backward()
    store.read(query, "hard").values.sum().backward()
    assert store.values.grad is not None
    assert store.values.grad.shape == (0, 2)
    assert store.values.grad.layout == (torch.sparse_coo if sparse_grad else torch.strided)


def test_mass_of_a_topk_read_is_known_only_when_it_holds_every_row() -> None:
    problem = Problem.random(rows=10)
    store = store_of(problem)
    assert store.read(problem.query, "topk", k=9).mass.isnan().all()
    assert (store.read(problem.query, "topk", k=10).mass == 1).all()
    assert (store.read(problem.query, "topk", k=4, where=torch.tensor([1, 2, 3, 8])).mass == 1).all()
    assert (store.read(problem.query, "hard", where=torch.tensor([4])).mass == 1).all()
    assert (store.read(problem.query, "topk", k=10, where=lambda row: row["id"] > 2).mass == 1).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("mode", ["exact", "topk", "hard"])
def test_shapes_follow_the_query(mode: str, shape: tuple[int, ...]) -> None:
    store = SoftKVStore(4, 2)
    store.add(torch.randn(9, 4), torch.randn(9, 2))
    how = {} if mode == "hard" else {"k": 3}
    exclude = torch.zeros(*shape, 2, dtype=torch.int64)
    read = store.read(torch.randn(*shape, 4), mode, exclude=exclude, temperature=torch.ones(shape), **how)
    width = 1 if mode == "hard" else 3
    assert read.values.shape == (*shape, 2)
    assert read.ids.shape == read.weights.shape == read.scores.shape == (*shape, width)
    assert read.lse.shape == read.mass.shape == shape
    assert read.ids.dtype == torch.int64
    assert read.error is None
    assert (read.ids != 0).all()


def test_exact_without_k_reports_no_rows() -> None:
    store = SoftKVStore(4, 2)
    store.add(torch.randn(9, 4), torch.randn(9, 2))
    read = store.read(torch.randn(3, 4))
    assert read.ids is read.weights is read.scores is None
    assert (read.mass == 1).all()


def test_calling_the_store_gives_the_values() -> None:
    problem = Problem.random()
    store = store_of(problem)
    assert (store(problem.query) == store.read(problem.query).values).all()
    assert (store(problem.query, mode="topk", k=2) == store.read(problem.query, "topk", k=2).values).all()


def test_query_and_storage_may_differ_in_dtype() -> None:
    problem = Problem.random()
    narrow = store_of(problem.to(torch.bfloat16))
    read = narrow.read(problem.query)
    assert read.values.dtype == torch.float32
    wide = narrow.read(problem.query.double())
    assert wide.values.dtype == wide.lse.dtype == torch.float64
    answer = reference.read(problem.query.double(), narrow.keys.double(), narrow.values.double())
    assert largest_error(wide.values, answer.values) < 1e-12
    assert largest_error(read.values, answer.values) < 1e-5


def test_a_learnable_temperature() -> None:
    problem = Problem.random()
    store = store_of(problem)
    log_temperature = torch.nn.Parameter(torch.zeros(()))
    store.read(problem.query, temperature=log_temperature.exp()).values.sum().backward()
    assert log_temperature.grad is not None
    assert log_temperature.grad != 0


# -- the table -------------------------------------------------------------------------------------------


def test_assigned_ids_rise_and_are_never_reused() -> None:
    store = SoftKVStore(1, 1)
    rows = torch.ones(3, 1)
    assert store.add(rows, rows).tolist() == [0, 1, 2]
    store.delete([1, 2])
    assert store.add(rows, rows).tolist() == [3, 4, 5]
    assert store.add(rows[:1], rows[:1], ids=[1]).tolist() == [1]
    store.put([100], rows[:1], rows[:1])
    store.delete(store.ids)
    assert len(store) == 0
    other = SoftKVStore(1, 1)
    other.load_state_dict(store.state_dict())
    assert other.add(rows, rows).tolist() == [101, 102, 103]


@pytest.mark.parametrize("device", ["bogus", "cuda:999", 1.5])
def test_a_device_that_is_not_available_is_an_error(device: Any) -> None:
    with pytest.raises(softdb.DeviceError, match="device: expected an available device, got"):
        SoftKVStore(3, 2, device=device)


def test_touch_accepts_one_id() -> None:
    store = SoftKVStore(2, 1, index="IVF2,Flat")
    store.add(torch.randn(100, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(100, 1))
    store.build_index()
    store.keys.data[7] = torch.tensor([50.0, 0.0])
    store.touch(7)
    assert store.read(torch.tensor([1.0, 0.0]), "topk", k=1).ids.tolist() == [7]


def test_get_returns_rows_in_the_order_of_the_ids() -> None:
    store = SoftKVStore(2, 1, fields=("time", "kind"))
    keys, values = torch.arange(8.0).view(4, 2), torch.arange(4.0)[:, None]
    store.add(keys, values, ids=[30, 10, 20, 40], fields={"time": torch.arange(4), "kind": 7})
    rows = store.get([20, 30, 20])
    assert (rows.keys == keys[[2, 0, 2]]).all()
    assert (rows.values == values[[2, 0, 2]]).all()
    assert rows.fields["time"].tolist() == [2, 0, 2]
    assert rows.fields["kind"].tolist() == [7, 7, 7]
    assert store.ids.tolist() == [30, 10, 20, 40]
    assert 10 in store
    assert torch.tensor(10) in store
    assert 11 not in store
    assert "10" not in store
    assert -1 not in store
    assert 2**70 not in store


def test_update_changes_only_what_is_given() -> None:
    store = SoftKVStore(2, 1, fields=("time",))
    store.add(torch.ones(3, 2), torch.ones(3, 1), fields={"time": [1, 2, 3]})
    store.update([2], values=torch.tensor([[5.0]]))
    store.update([0], fields={"time": [9]})
    store.update([1], keys=torch.tensor([[7.0, 8.0]]))
    rows = store.get([0, 1, 2])
    assert rows.keys.tolist() == [[1, 1], [7, 8], [1, 1]]
    assert rows.values.tolist() == [[1], [1], [5]]
    assert rows.fields["time"].tolist() == [9, 2, 3]


def test_stored_rows_are_detached_copies() -> None:
    store = SoftKVStore(2, 1)
    keys = torch.ones(3, 2, requires_grad=True)
    store.add(keys * 2, torch.ones(3, 1))
    assert not store.keys.requires_grad
    before = store.ids
    before += 100
    assert store.ids.tolist() == [0, 1, 2]


def test_storage_doubles_unless_reserve_was_called() -> None:
    store = SoftKVStore(1, 1)
    row = torch.ones(1, 1)
    capacities = []
    for _ in range(9):
        store.add(row, row)
        capacities.append(len(store.keys))
    assert capacities == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    store.reserve(100)
    keys = store.keys
    store.add(row.expand(91, 1), row.expand(91, 1))
    assert store.keys is keys
    assert len(keys) == 100


@pytest.mark.parametrize("ids", [[0, 2**40, 5, 2**62], [2**63 - 2]])
def test_ids_of_any_size(ids: list[int]) -> None:
    store = SoftKVStore(1, 1)
    rows = torch.arange(float(len(ids)))[:, None]
    store.add(rows, rows, ids=ids)
    assert store.get(list(reversed(ids))).keys.flatten().tolist() == list(reversed(range(len(ids))))
    store.delete(ids)
    assert len(store) == 0
    if max(ids) == 2**63 - 2:
        with pytest.raises(softdb.ArgumentError, match="expected unused ids"):
            store.add(rows, rows)


# -- between a read and its backward ---------------------------------------------------------------------


def step(store: SoftKVStore) -> None:
    for table in (store.keys, store.values):
        table.grad = torch.ones_like(table)
    torch.optim.SGD(store.parameters(), lr=0.1).step()


def test_growth_while_a_read_waits_for_its_backward() -> None:
    problem = Problem.random(rows=30)
    rows = torch.ones(5, 8), torch.ones(5, 3)
    store = store_of(problem, trainable=True)
    read = store.read(problem.query, "topk", k=3)
    before = copy.deepcopy(store.state_dict())
    with pytest.raises(softdb.GrowthError, match=r"store.reserve\(35\)"):
        store.add(*rows)
    assert all(torch.equal(before[name], tensor) for name, tensor in store.state_dict().items())
    read.values.sum().backward()
    parameter = store.keys
    store.add(*rows)
    assert store.keys is parameter
    assert len(store) == 35
    read = store.read(problem.query)
    del read
    store.add(torch.ones(50, 8), torch.ones(50, 3))
    with torch.no_grad():
        kept = store.read(problem.query)
    store.add(torch.ones(500, 8), torch.ones(500, 3))
    assert kept.values.shape == (5, 3)


@pytest.mark.parametrize(
    ("rows", "change", "remedy"),
    [
        (12, "shrink from 20 to 12 rows", r"the old size; call backward\(\) or delete the read first"),
        (32, "grow from 20 to 32 rows", r"call store.reserve\(32\).* or call backward\(\)"),
    ],
)
def test_a_state_of_another_size_is_not_loaded_while_a_read_waits(rows: int, change: str, remedy: str) -> None:
    store = store_of(Problem.random(rows=20), trainable=True)
    other = store_of(Problem.random(rows=rows), trainable=True)
    read = store.read(torch.ones(8))
    with pytest.raises(softdb.GrowthError, match=f"the storage must {change}.*{remedy}"):
        store.load_state_dict(other.state_dict())
    assert len(store) == 20
    if rows > 20:
        read.values.sum().backward()
        store.reserve(rows)
        read = store.read(torch.ones(8))
    else:
        del read
    store.load_state_dict(other.state_dict())
    assert torch.equal(store.keys, other.keys)


def test_a_state_of_another_size_is_loaded_before_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(Problem.random(rows=20), trainable=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rows, change in ((12, "shrink from 20 to 12 rows"), (32, "grow from 20 to 32 rows")):
        state = store_of(Problem.random(rows=rows)).state_dict()
        with pytest.raises(softdb.GrowthError, match=f"{change}, which .* support; load the state before wrapping"):
            store.load_state_dict(state)


@pytest.mark.parametrize("how", [{}, {"k": 2}, {"mode": "topk", "k": 2}], ids=str)
def test_growth_while_an_old_loss_is_kept(how: dict[str, object]) -> None:
    problem = Problem.random(rows=6)
    store = store_of(problem, trainable=True)
    losses = []
    for turn in range(3):
        read = store.read(problem.query, **how)
        losses.append(read.values.sum())
        losses[-1].backward()
        grad = store.values.grad.to_dense()
        assert grad.shape == (len(store), 3)
        assert grad.isfinite().all()
        store.zero_grad()
        store.add(torch.randn(6 * 2**turn, 8), torch.randn(6 * 2**turn, 3))


def test_growth_among_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    problem = Problem.random(rows=30)
    fixed = store_of(problem)
    fixed.add(torch.ones(5, 8), torch.ones(5, 3))
    store = SoftKVStore(8, 3, trainable=True)
    store.add(problem.keys, problem.values)  # an empty store is not wrapped yet
    with pytest.raises(softdb.GrowthError, match=r"which DistributedDataParallel does not support; call store.reserve"):
        store.add(problem.keys, problem.values)
    assert len(store) == 30
    store.reserve(60)
    store.add(problem.keys, problem.values)


def test_growth_keeps_a_dense_gradient() -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True)
    store.read(problem.query).values.sum().backward()
    before = store.keys.grad.clone()
    store.add(torch.ones(1, 8), torch.ones(1, 3))
    assert (store.keys.grad[:30] == before).all()
    assert (store.keys.grad[30:] == 0).all()
    store.read(problem.query).values.sum().backward()


def test_a_store_of_buffers_can_always_grow() -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem)
    read = store.read(problem.query)
    store.add(torch.ones(500, 8), torch.ones(500, 3))
    read.values.sum().backward()
    (wanted,) = torch.autograd.grad(problem.answer().values.sum(), problem.query)
    assert allclose(problem.query.grad, wanted, atol=1e-6)


def test_dense_and_row_sparse_gradients_mix_in_one_step() -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True)
    loss = store.read(problem.query, "topk", k=2).values.sum() + store.read(problem.query).values.sum()
    loss.backward()
    torch.optim.SGD(store.parameters(), lr=0.1).step()
    assert store.keys.isfinite().all()


def test_a_sparse_gradient_survives_growth() -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True)
    store.read(problem.query, "topk", k=3).values.sum().backward()
    before = store.values.grad.to_dense()
    store.add(torch.ones(1, 8), torch.ones(1, 3))
    assert (store.values.grad.to_dense()[:30] == before).all()
    store.read(problem.query, "topk", k=3).values.sum().backward()
    assert store.values.grad.shape == (60, 3)


def test_deleting_a_row_with_a_sparse_gradient_warns_of_nothing() -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True, sparse_grad=True)
    read = store.read(problem.query, "topk", k=3)
    read.values.sum().backward()
    gone = int(read.ids[0, 0])
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not once in a process
    try:
        store.delete([gone])
    finally:
        torch.set_warn_always(always)
    for table in (store.keys, store.values):
        assert gone not in table.grad.indices()[0]
        assert table.grad.is_coalesced()


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_an_optimizer_whose_state_did_not_grow_is_stopped(options: dict[str, bool]) -> None:
    problem = Problem.random(rows=20)
    store = store_of(problem, trainable=True)
    optimizer = torch.optim.Adam(store.parameters(), **options)
    store.read(problem.query).values.sum().backward()
    optimizer.step()
    store.add(torch.randn(30, 8), torch.randn(30, 3))
    store.read(problem.query).values.sum().backward()
    before = store.keys.detach().clone()
    with pytest.raises(
        softdb.GrowthError, match=r"50 rows in its state 'exp_avg'.*grown, got shape \(20, 8\); call store.reserve"
    ):
        optimizer.step()
    assert (store.keys == before).all()
    store.load_state_dict(store_of(Problem.random(rows=12)).state_dict())
    store.read(problem.query).values.sum().backward()
    with pytest.raises(
        softdb.GrowthError, match=r"12 rows in its state 'exp_avg'.*shrunk, got shape \(20, 8\); construct a new"
    ):
        optimizer.step()


@pytest.mark.parametrize("kind", ["Adafactor", "LBFGS", "Adam", "Rprop", "RMSprop"])
def test_other_optimizers_can_step(kind: str) -> None:
    problem = Problem.random(rows=20)
    store = store_of(problem, trainable=True)
    optimizer = getattr(torch.optim, kind)(store.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = store.read(problem.query).values.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


def test_a_step_records_the_rows_whose_gradients_its_closure_computes() -> None:
    problem = Problem.random(rows=200)
    store = store_of(problem, trainable=True, sparse_grad=True)
    optimizer = torch.optim.SGD(store.parameters(), lr=0.1)
    queries = torch.randn(2, 8, dtype=store.keys.dtype)
    first = store.read(queries[0], "topk", k=3)
    first.values.sum().backward()
    read: list[int] = []

    def closure() -> float:
        optimizer.zero_grad()
        found = store.read(queries[1], "topk", k=3)
        found.values.sum().backward()
        assert found.ids is not None
        read.extend(found.ids.tolist())
        return 0.0

    version, keys = store.rows.version, store.keys.detach().clone()
    optimizer.step(closure)
    updated = (store.keys != keys).any(-1).nonzero().flatten().tolist()
    assert updated == sorted(read)
    assert first.ids is not None
    recorded = store.rows.changed_since(version, keys=True).tolist()
    assert recorded == sorted({*read, *first.ids.tolist()})  # the step may have used either gradient


def test_the_answer_may_be_written_to_in_place() -> None:
    problem = Problem.random()
    read = store_of(problem, trainable=True).read(problem.query, "topk", k=3)
    read.values.add_(1.0).relu_().sum().backward()
    assert problem.query.grad is not None


def test_a_store_filled_in_inference_mode_is_an_ordinary_store() -> None:
    problem = Problem.random(rows=60)
    for trainable in (False, True):
        with torch.inference_mode():
            store = store_of(problem, trainable=trainable, index="IVF4,Flat")
            store.delete([3])
            store.update([5], keys=torch.zeros(1, 8))
            store.read(problem.query, "topk", k=3)
            store.read(problem.query)
            other = SoftKVStore(8, 3, trainable=trainable)
            other.load_state_dict(store.state_dict())
            other.double().float()
        other.add(torch.ones(3, 8), torch.ones(3, 3))
        for how in ({}, {"k": 3}, {"mode": "topk", "k": 3}, {"mode": "hard"}):
            read = store.read(problem.query, **how)
            (read.values.sum() + read.lse.sum()).backward()
        del read
        store.delete([4])
        store.add(torch.ones(100, 8), torch.ones(100, 3))
        store.update([7], values=torch.zeros(1, 3))
        assert store.read(problem.query, "topk", k=3).ids.shape == (5, 3)


def test_rows_may_be_copied_from_the_store_itself() -> None:
    store = SoftKVStore(2, 2)
    store.add(torch.arange(8.0).view(4, 2), torch.arange(8.0).view(4, 2))
    store.put([1, 2, 3, 50], store.keys[0:4], store.values[0:4])
    assert store.get([1, 2, 3, 50]).keys.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    store.update([0, 1, 2], keys=torch.ones(3, 2), values=store.values[1:4])
    assert store.get([0, 1, 2]).values.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1), (1, 123), (5, 123), (123,)], ids=str)
def test_the_answer_of_a_callable_broadcasts(shape: tuple[int, ...]) -> None:
    problem = Problem.random()
    store = store_of(problem)
    for how in ({}, {"k": 3}, {"mode": "topk", "k": 3}, {"mode": "hard"}):
        read = store.read(problem.query, where=lambda row: torch.zeros(shape, dtype=torch.bool), **how)
        assert (read.lse == -math.inf).all()


@pytest.mark.cpu_only
def test_a_hidden_row_that_overflows_does_no_harm() -> None:
    store = SoftKVStore(2, 1, metric="dot")
    store.add(torch.tensor([[1e30, 0], [1, 0], [2, 0], [1, 1]]), torch.arange(4.0)[:, None])
    query = torch.tensor([[1e10, 0]])
    for where in (torch.tensor([False, True, True, True]), lambda row: (row["id"] > 0).expand(1, -1)):
        assert store.read(query, where=where).values.item() == 2
    with pytest.raises(softdb.NonFiniteError, match="expected finite scores"):
        store.read(query)
    with pytest.raises(softdb.NonFiniteError, match="expected finite scores"):
        store.read(-query, where=torch.tensor([0]))


def test_blocks_stay_small_where_rows_are_copied() -> None:
    store = SoftKVStore(512, 1, metric="cosine")
    store.add(torch.randn(40_000, 512), torch.randn(40_000, 1))
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() < store.keys.numel():  # not a view of all keys
                largest = max(largest, result.numel())
            return result

    with Watch(), torch.no_grad():
        store.read(torch.randn(512))
    assert 0 < largest <= 2**21


@pytest.mark.cpu_only
def test_deleted_rows_leave_no_nan_behind() -> None:
    store = SoftKVStore(2, 1, trainable=True)
    store.add(torch.ones(3, 2), torch.ones(3, 1))
    with torch.no_grad():
        store.values[1] = math.nan
        store.keys[1] = math.nan
    with pytest.raises(softdb.NonFiniteError, match="training may have diverged"):
        store.read(torch.ones(1, 2))
    store.delete([1])
    assert store.read(torch.ones(1, 2)).values.item() == 1


# -- as a module -----------------------------------------------------------------------------------------


def test_parameters_or_buffers() -> None:
    assert [name for name, _ in SoftKVStore(2, 1, trainable=True).named_parameters()] == ["keys", "values"]
    fixed = SoftKVStore(2, 1)
    assert not list(fixed.parameters())
    assert {"keys", "values"} <= {name for name, _ in fixed.named_buffers()}


def test_repr_says_what_it_is() -> None:
    store = SoftKVStore(2, 1, metric="l2", temperature=0.5, fields=("time",), index="HNSW32")
    shape, rest = "rows=0, key_dim=2, value_dim=1, metric='l2', ", "trainable=False, index='HNSW32'"
    assert store.extra_repr() == shape + "temperature=0.5, fields=('time',), " + rest


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda store: pickle.loads(pickle.dumps(store)),
    "torch.save": lambda store: torch_save(store),
    "state_dict": lambda store: load_into(
        SoftKVStore(8, 3, fields=("time",), trainable=store.trainable, index="IVF4,Flat"), store
    ),
    "state_dict of a larger": lambda store: load_into(larger(store), store),
}


def torch_save(store: SoftKVStore) -> SoftKVStore:
    file = io.BytesIO()
    torch.save(store, file)
    file.seek(0)
    loaded: SoftKVStore = torch.load(file, weights_only=False)
    return loaded


def load_into(other: SoftKVStore, store: SoftKVStore) -> SoftKVStore:
    other.load_state_dict({name: tensor.clone() for name, tensor in store.state_dict().items()})
    return other


def larger(store: SoftKVStore) -> SoftKVStore:
    other = SoftKVStore(8, 3, fields=("time",), trainable=store.trainable, index="IVF4,Flat")
    other.add(torch.randn(700, 8), torch.randn(700, 3), fields={"time": 1})
    other.read(torch.randn(1, 8), "topk", k=3)
    return other


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_equal_and_separate(how: str, trainable: bool) -> None:
    torch.manual_seed(0)
    store = SoftKVStore(8, 3, fields=("time",), trainable=trainable, index="IVF4,Flat")
    store.add(torch.randn(300, 8), torch.randn(300, 3), fields={"time": torch.arange(300)})
    query = torch.randn(4, 8)
    store.read(query, "topk", k=3)
    store.delete(torch.arange(0, 300, 7))
    copied = COPIES[how](store)
    assert len(copied) == len(store)
    assert (copied.ids == store.ids).all()
    for options in ({"k": 5}, {"mode": "topk", "k": 400}, {"mode": "hard"}):
        first, second = store.read(query, **options), copied.read(query, **options)
        assert allclose(first.values, second.values)
        assert (first.ids == second.ids).all()
    assert (copied.get([1, 2]).fields["time"] == torch.tensor([1, 2])).all()
    copied.delete([1])
    assert 1 in store
    assert copied.add(torch.zeros(1, 8), torch.zeros(1, 3), fields={"time": 0}).tolist() == [300]
    assert len(store.ids.unique()) == len(store)
    if trainable:
        assert isinstance(copied.keys, torch.nn.Parameter)
        read = copied.read(query)
        for parameter in copied.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(copied.parameters(), lr=0.1).step()
        with pytest.raises(softdb.StaleReadError):
            read.values.sum().backward()


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    store = SoftKVStore(8, 3)
    store.add(torch.ones(2, 8), torch.ones(2, 3))
    other = SoftKVStore(7, 3)
    other.add(torch.ones(5, 7), torch.ones(5, 3))
    with pytest.raises(softdb.ShapeError, match=r"state_dict\['keys'\]: expected shape \(5, 8\), got \(5, 7\)"):
        store.load_state_dict(other.state_dict())
    state = {name: tensor.clone() for name, tensor in store.state_dict().items()}
    state["rows.ids"][1] = 0
    with pytest.raises(softdb.DuplicateIdError, match="state_dict"):
        store.load_state_dict(state)
    assert store.ids.tolist() == [0, 1]


def test_conversion_to_another_dtype() -> None:
    problem = Problem.random(rows=300)
    store = store_of(problem, index="IVF4,Flat", trainable=True)
    store.read(problem.query, "topk", k=3)
    before = store.read(problem.query, k=3)
    store.to(torch.float32)  # nothing to do, so a read may still go backward
    before.values.sum().backward()
    assert store.index_stats().builds == 1
    store.to(torch.float64)
    assert store.keys.dtype == torch.float64
    assert store.rows.ids.dtype == torch.int64
    after = store.read(problem.query.double(), "topk", k=300)
    assert (after.ids[:, :3] == before.ids).all()
    store.to(torch.bfloat16)
    assert store.read(problem.query, "topk", k=3).values.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler
def test_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.store = store

        def forward(self, query: Tensor, **how: object) -> Tensor:
            return self.store.read(query * 2.0, **how).values.relu()

    model = Model()
    compiled = torch.compile(model, backend="eager")
    for how in ({}, {"k": 2}, {"mode": "topk", "k": 2}, {"mode": "hard"}, {"where": lambda row: row["id"] < 9}):
        for _ in range(3):
            ours, wanted = compiled(problem.query, **how), model(problem.query, **how)
            assert torch.equal(ours, wanted)
            grads = [torch.autograd.grad(values.sum(), store.values)[0].to_dense() for values in (ours, wanted)]
            assert torch.equal(*grads)
            store.update([1], keys=torch.randn(1, 8))


def test_as_part_of_a_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 8), "memory": SoftKVStore(8, 2, trainable=True)})
    memory = model["memory"]
    memory.add(torch.randn(20, 8), torch.randn(20, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, wanted = torch.randn(32, 4), torch.randn(32, 2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (memory(model["encoder"](x)) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert set(model.state_dict()) >= {"encoder.weight", "memory.keys", "memory.values", "memory.rows.ids"}


# -- a store against a dict ------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """Random writes and reads of a store, and of a dict with the expected rows."""

    ids = Bundle("ids")
    index = "Flat"

    def __init__(self) -> None:
        super().__init__()
        self.store = SoftKVStore(3, 1, fields=("time",), index=self.index)
        self.model: dict[int, tuple[list[float], float, int]] = {}
        self.next = 0
        self.generator = torch.Generator().manual_seed(0)

    def make(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        keys = torch.randint(-4, 5, (count, 3), generator=self.generator).float()
        return (
            keys,
            torch.randn(count, 1, generator=self.generator),
            torch.randint(9, (count,), generator=self.generator),
        )

    def note(self, ids: list[int], keys: Tensor, values: Tensor, times: Tensor) -> None:
        for number, key, value, time in zip(ids, keys.tolist(), values.flatten().tolist(), times.tolist(), strict=True):
            self.model[number] = (key, value, time)
            self.next = max(self.next, number + 1)

    @rule(target=ids, count=st.integers(0, 6))
    def add(self, count: int):  # type: ignore[no-untyped-def]
        rows = self.make(count)
        got = self.store.add(*rows[:2], fields={"time": rows[2]}).tolist()
        assert got == list(range(self.next, self.next + count))
        self.note(got, *rows)
        return multiple(*got)

    @rule(target=ids, number=st.integers(0, 60) | st.integers(2**40, 2**40 + 3))
    def put(self, number: int) -> int:
        rows = self.make(1)
        self.store.put([number], *rows[:2], fields={"time": rows[2]})
        self.note([number], *rows)
        return number

    @rule(number=ids)
    def update(self, number: int) -> None:
        keys, values, times = self.make(1)
        if number not in self.model:
            with pytest.raises(softdb.UnknownIdError):
                self.store.update([number], keys=keys)
            return
        self.store.update([number], keys=keys, values=values, fields={"time": times})
        self.note([number], keys, values, times)

    @rule(number=consumes(ids))
    def delete(self, number: int) -> None:
        if number in self.model:
            self.store.delete([number])
            del self.model[number]
        else:
            with pytest.raises(softdb.UnknownIdError):
                self.store.delete([number])

    @rule(limit=st.integers(0, 9), kind=st.sampled_from(["rule", "mask", "ids"]))
    def delete_where(self, limit: int, kind: str) -> None:
        removed = [number for number, (_, _, time) in self.model.items() if time < limit]
        where: Any = removed
        if kind == "rule":
            where = lambda row: row["time"] < limit  # noqa: E731
        elif kind == "mask":
            where = torch.isin(self.store.ids, torch.tensor(removed, dtype=torch.int64))
        self.store.delete(where=where)
        self.model = {number: row for number, row in self.model.items() if number not in removed}

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.model.clear()

    @rule(ids=st.lists(st.integers(-1, 40) | st.just(2**40), max_size=4))
    def get_with_padding(self, ids: list[int]) -> None:
        rows = self.store.get([ids], missing="pad")
        expected = [self.model.get(number, ([0.0] * 3, 0.0, -1)) for number in ids]
        assert rows.keys.tolist() == [[row[0] for row in expected]]
        assert rows.values.squeeze(-1).tolist() == [[row[1] for row in expected]]
        assert rows.fields["time"].tolist() == [[row[2] for row in expected]]
        assert self.store.fields_at(ids, "time", fill=-5).tolist() == [
            self.model[number][2] if number in self.model else -5 for number in ids
        ]

    @rule()
    def reload(self) -> None:
        other = SoftKVStore(3, 1, fields=("time",), index=self.index)
        other.load_state_dict(self.store.state_dict())
        self.store = other

    @rule()
    def compact(self) -> None:
        ids = self.store.ids
        self.store.compact()
        assert torch.equal(self.store.ids, ids)
        assert len(self.store.keys) == len(ids)

    @precondition(lambda self: self.model)
    @rule(k=st.integers(1, 9), limit=st.integers(0, 9), mode=st.sampled_from(["exact", "topk", "hard"]))
    def read(self, k: int, limit: int, mode: str) -> None:
        query = torch.randn(2, 3, generator=self.generator, dtype=torch.float64)
        ids = sorted(self.model)
        keys = torch.tensor([self.model[number][0] for number in ids], dtype=torch.float64)
        values = torch.tensor([[self.model[number][1]] for number in ids], dtype=torch.float64)
        times = torch.tensor([self.model[number][2] for number in ids])
        hidden = torch.tensor([[ids[0]], [-1]])
        visible = (times < limit).expand(2, -1).clone()
        visible[0, 0] = False
        answer = reference.read(query, keys, values, visible=visible)
        width = 1 if mode == "hard" else k
        how = {} if mode == "hard" else {"k": k}
        got = self.store.read(query, mode, where=lambda row: row["time"] < limit, exclude=hidden, **how)
        ordered = answer.scores.sort(dim=-1, descending=True).values[:, :width]
        found = (got.scores > -math.inf).sum(-1)
        assert (found == visible.sum(-1).clamp(max=width)).all()
        for row in range(2):
            count = int(found[row])
            names = got.ids[row, :count].tolist()
            assert len(set(names)) == count
            assert (got.ids[row, count:] == -1).all()
            columns = torch.tensor([ids.index(name) for name in names], dtype=torch.int64)
            assert visible[row, columns].all()
            assert allclose(got.scores[row, :count], answer.scores[row, columns], atol=1e-5)
            assert allclose(got.scores[row, :count], ordered[row, :count], atol=1e-5)
        if mode == "exact":
            assert allclose(got.values, answer.values, atol=1e-5)

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        self.store._check()
        ids = sorted(self.model)
        assert self.store.ids.sort().values.tolist() == ids
        if ids:
            rows = self.store.get(ids)
            assert rows.keys.tolist() == [self.model[number][0] for number in ids]
            assert rows.fields["time"].tolist() == [self.model[number][2] for number in ids]


class FaissStoreMachine(StoreMachine):
    """The same with a FAISS index that holds even a handful of rows."""

    index = "IVF1,Flat"


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestFaissStoreMachine = FaissStoreMachine.TestCase
TestStoreMachine.pytestmark = TestFaissStoreMachine.pytestmark = pytest.mark.slow
TestFaissStoreMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


# -- the bound on scores that a store keeps --------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.update([0], values=torch.ones(1, 2)),
        lambda store: store.update([0], fields={"at": [3]}),
        lambda store: store.values.data.mul_(1.0) if store.touch([1]) is None else None,
        lambda store: store.delete(store.ids[:1]),
        lambda store: store.add(200 * torch.ones(1, 4), torch.ones(1, 2), fields={"at": 0}),
    ],
)
def test_reads_of_many_rows_follow_every_write(write: Callable[[SoftKVStore], object]) -> None:
    torch.manual_seed(0)
    store = SoftKVStore(4, 2, fields=("at",))
    store.add(torch.randn(60_000, 4), torch.randn(60_000, 2), fields={"at": 0})
    query = torch.randn(3, 4)
    for _ in range(2):
        read = store.read(query)
        rows = store.get(store.ids)
        answer = reference.read(query.double(), rows.keys.double(), rows.values.double())
        assert largest_error(read.values, answer.values) < 1e-5
        assert largest_error(read.lse, answer.lse) < 1e-4
        write(store)


@pytest.mark.parametrize("height", [-100.0, 20.0])
def test_unreported_writes_that_break_a_bound_give_right_reads(height: float) -> None:
    store = SoftKVStore(4, 1, metric="dot")
    store.add(torch.full((70_000, 4), 0.1), torch.ones(70_000, 1))
    query = torch.ones(2, 4)
    store.read(query)
    store.keys.data.fill_(height)  # without a touch
    read = store.read(query)
    assert allclose(read.values, torch.ones(2, 1))
    assert allclose(read.lse, torch.tensor(4 * height + math.log(70_000)))


def test_copies_of_an_empty_store_are_empty() -> None:
    store = SoftKVStore(4, 2)
    for copied in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)), copy.deepcopy(store).double()):
        assert (copied.read(torch.randn(3, 4)).values == 0).all()


class StoreWithMore(SoftKVStore):
    """A subclass that saves something of its own."""

    more = 0

    def get_extra_state(self) -> int:
        return self.more

    def set_extra_state(self, state: int) -> None:
        self.more = state


def test_a_subclass_may_have_extra_state() -> None:
    saved, loaded, plain = StoreWithMore(2, 1), StoreWithMore(2, 1), SoftKVStore(2, 1)
    saved.more = 5
    saved.add(torch.eye(2), torch.ones(2, 1))
    loaded.load_state_dict(saved.state_dict())
    assert loaded.more == 5
    assert len(loaded) == 2
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_extra_state"):
        plain.load_state_dict(saved.state_dict())
    assert len(plain) == 0


def test_hooks_may_rename_what_is_loaded_into_a_store_of_another_size() -> None:
    saved, loaded, calls = SoftKVStore(2, 1), SoftKVStore(2, 1), []
    saved.add(torch.eye(2), torch.ones(2, 1))
    state = {name.replace("keys", "addresses"): tensor for name, tensor in saved.state_dict().items()}

    def rename(module: torch.nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        calls.append(prefix)
        state[f"{prefix}keys"] = state.pop(f"{prefix}addresses")

    loaded.register_load_state_dict_pre_hook(rename)
    torch.nn.ModuleDict({"store": loaded}).load_state_dict({f"store.{name}": state[name] for name in state})
    assert calls == ["store."]
    assert torch.equal(loaded.get([0, 1]).keys, torch.eye(2))
    loaded.load_state_dict(state)  # the hook is still there
    assert calls == ["store.", ""]


@pytest.mark.parametrize("trainable", [False, True])
def test_a_store_without_memory_takes_the_tensors_that_it_loads(trainable: bool) -> None:
    saved = SoftKVStore(4, 2, trainable=trainable, index="IVF2,Flat")
    saved.add(torch.randn(100, 4), torch.randn(100, 2))
    with torch.device("meta"):
        loaded = SoftKVStore(4, 2, trainable=trainable, index="IVF2,Flat")
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    loaded._check()
    query = torch.randn(5, 4)
    assert torch.equal(loaded.read(query, "topk", k=3).values, saved.read(query, "topk", k=3).values)
    loaded.update([7], keys=query[:1] * 100)
    loaded.add(query, torch.ones(5, 2))
    assert loaded.read(query[0], "topk", k=1).ids == 7
    loaded._check()


# -- settings that are assigned -----------------------------------------------------------------------------


def test_a_temperature_that_is_assigned_is_a_number_that_can_be_saved(tmp_path: Path) -> None:
    store = SoftKVStore(2, 1)
    store.add(torch.eye(2), torch.eye(2)[:, :1])
    query = torch.randn(3, 2)
    store.temperature = torch.tensor(0.5)
    assert type(store.temperature) is float
    assert torch.equal(store(query), store(query, temperature=0.5))
    store.save(tmp_path)
    assert SoftKVStore.load(tmp_path).temperature == copy.deepcopy(store).temperature == 0.5
    for learnable in (torch.tensor(1.0, requires_grad=True), nn.Parameter(torch.tensor(1.0))):
        with pytest.raises(softdb.DtypeError, match=r"requires grad; pass it to read\(temperature=...\)"):
            store.temperature = learnable
        with pytest.raises(softdb.DtypeError, match=r"requires grad; pass it to read\(temperature=...\)"):
            SoftKVStore(2, 1, temperature=learnable)
    with pytest.raises(softdb.ArgumentError, match="temperature: expected a finite number above 0, got 0"):
        store.temperature = 0
    assert store.temperature == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("metric", "l2"), ("key_dim", 3), ("value_dim", 2), ("capacity", 9), ("evict", "lru"), ("trainable", True)],
)
def test_a_setting_that_the_tensors_or_the_index_depend_on_cannot_be_assigned(name: str, value: Any) -> None:
    store = SoftKVStore(2, 1)
    before = getattr(store, name)
    with pytest.raises(softdb.ArgumentError, match=f"{name}: expected .* which the store was made with"):
        setattr(store, name, value)
    setattr(store, name, before)
    assert getattr(store, name) == before


# -- state dicts of stores with other options -----------------------------------------------------------------------

HISTORIES: dict[str, dict[str, Any]] = {
    "nothing counted": {},
    "usage": {"track_usage": True},
    "lru": {"evict": "lru"},
    "oldest": {"evict": "oldest"},
    "lru and usage": {"evict": "lru", "track_usage": True},
}
OPTIONAL = {"reads", "weight", "used_at", "added_at"}


def with_history(options: dict[str, Any], number: float, rows: int = 5) -> SoftKVStore:
    store = SoftKVStore(2, 1, capacity=8, fields=("time",), **options)
    store.add(torch.full((rows, 2), number), torch.full((rows, 1), number), fields={"time": 7})
    store.delete([1])
    for _ in range(3):
        store.read(torch.ones(2, 2), "topk", k=rows - 2)
    return store


def wrapped(store: SoftKVStore, how: str) -> nn.Module:
    """The store itself, or a model that it is part of."""
    if how == "a model":
        return nn.ModuleDict({"memory": store, "linear": nn.Linear(2, 2)})
    return MemoryLayer(2, len(store), key_dim=2, value_dim=1, k=1, store=store) if how == "a layer" else store


def prefix_of(how: str) -> str:
    return {"a store": "", "a model": "memory.", "a layer": "stores.0."}[how]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a store", "a model", "a layer"])
@pytest.mark.parametrize("old", HISTORIES)
@pytest.mark.parametrize("new", HISTORIES)
def test_counters_and_clocks_are_optional_in_a_state_that_is_loaded(new: str, old: str, how: str) -> None:
    saved = with_history(HISTORIES[old], 2.0)
    loaded = with_history(HISTORIES[new], 1.0)
    model = wrapped(loaded, how)
    found = model.load_state_dict(wrapped(saved, how).state_dict(), strict=False)
    start = f"{prefix_of(how)}rows."
    absent = set(loaded.rows.saved) - set(saved.rows.saved)
    assert absent <= OPTIONAL
    assert set(found.missing_keys) == {start + name for name in absent}
    assert set(found.unexpected_keys) == {start + name for name in set(saved.rows.saved) - set(loaded.rows.saved)}
    assert torch.equal(loaded.get(loaded.ids).keys, saved.get(saved.ids).keys)
    assert loaded.ids.tolist() == [0, 2, 3, 4]
    loaded._check()
    if loaded.rows.track_usage:
        wanted = saved.usage.reads if saved.rows.track_usage else torch.zeros(4, dtype=torch.int64)
        assert torch.equal(loaded.usage.reads, wanted)
        assert bool((loaded.usage.weight > 0).any()) == saved.rows.track_usage
    if loaded.evict is not None:  # With new clocks, rows are evicted in slot order.
        loaded.add(torch.ones(5, 2), torch.ones(5, 1), fields={"time": 1})
        if {"used_at", "added_at"} & absent:
            assert 0 not in loaded
            assert all(number in loaded for number in (2, 3, 4))
        loaded._check()


@pytest.mark.parametrize(
    ("new", "old"), [("usage", "nothing counted"), ("nothing counted", "usage"), ("lru", "oldest")]
)
def test_a_strict_load_of_other_counters_is_torchs_error_and_changes_nothing(new: str, old: str) -> None:
    saved, loaded = with_history(HISTORIES[old], 2.0), with_history(HISTORIES[new], 1.0)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    differing = sorted(set(saved.rows.saved) ^ set(loaded.rows.saved))
    with pytest.raises(RuntimeError, match=r"(?s)(Missing|Unexpected) key\(s\)") as caught:
        loaded.load_state_dict(saved.state_dict())
    assert all(f"rows.{name}" in str(caught.value) for name in differing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(RuntimeError, match=r"(?s)(Missing|Unexpected) key\(s\)") as caught:
        wrapped(loaded, "a model").load_state_dict(wrapped(saved, "a model").state_dict())
    assert all(f"memory.rows.{name}" in str(caught.value) for name in differing)
    loaded._check()


@pytest.mark.parametrize("gone", ["values", "rows.ids", "rows.field_time", "rows.generation"])
@pytest.mark.parametrize("how", ["a store", "a model"])
def test_keys_and_values_are_reported_missing_if_rows_cannot_be_loaded(gone: str, how: str) -> None:
    saved, loaded = with_history({}, 2.0), with_history({"track_usage": True}, 1.0)
    state = wrapped(saved, how).state_dict()
    before, prefix = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}, prefix_of(how)
    del state[prefix + gone]
    found = wrapped(loaded, how).load_state_dict(state | {f"{prefix}more": torch.zeros(1)}, strict=False)
    named = {"keys", "values", gone, "rows.reads", "rows.weight"}
    assert set(found.missing_keys) == {prefix + name for name in named}
    assert found.unexpected_keys == [f"{prefix}more"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_unexpected_names_prevent_loading_only_if_strict() -> None:
    saved, loaded = with_history({}, 2.0), with_history({}, 1.0)
    found = loaded.load_state_dict(saved.state_dict() | {"more": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["more"]
    assert torch.equal(loaded.keys, saved.keys)


def test_a_state_without_counters_is_assigned_to_a_store_on_meta() -> None:
    saved = with_history({}, 2.0)
    with torch.device("meta"):
        loaded = SoftKVStore(2, 1, capacity=8, fields=("time",), evict="oldest", track_usage=True)
    found = loaded.load_state_dict(saved.state_dict(), strict=False, assign=True)
    assert set(found.missing_keys) == {"rows.reads", "rows.weight", "rows.added_at"}
    assert loaded.ids.tolist() == [0, 2, 3, 4]
    assert loaded.usage.reads.tolist() == [0] * 4
    loaded._check()


@pytest.mark.slow
@pytest.mark.parametrize("key_dim", [3, 16, 64, 100])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("rows", [2, 5, 9, 31, 33, 1000, 5001])
def test_equal_rows_tie_to_the_lowest_slot(rows: int, queries: int, key_dim: int) -> None:
    torch.manual_seed(0)
    store = SoftKVStore(key_dim, 2, trainable=True)
    store.add(torch.randn(1, key_dim).expand(rows, key_dim), torch.randn(rows, 2))
    query = torch.randn(queries, key_dim)
    for k in (1, 2, 9, 31, 33):
        wanted = torch.arange(min(k, rows)).expand(queries, -1)
        for mode in ("exact", "topk"):
            for asked in (query, query.clone().requires_grad_()):
                read = store.read(asked, mode, k=k)
                assert torch.equal(read.ids[:, :rows], wanted)
                assert (read.scores[:, :rows] == read.scores[:, :1]).all()
            with torch.no_grad():
                assert torch.equal(store.read(query, mode, k=k).ids[:, :rows], wanted)
    assert (store.read(query, "hard").ids == 0).all()


def rows_of_ones(rows: int = 6, **options: Any) -> SoftKVStore:
    store = SoftKVStore(4, 3, **options)
    store.add(torch.ones(rows, 4), torch.ones(rows, 3))
    return store


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_loading_that_runs_out_of_memory_once_loads_everything(
    calls: int, assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = SoftKVStore(4, 3, trainable=True, track_usage=True), rows_of_ones(track_usage=True)
    store.add(torch.zeros(6, 4), torch.zeros(6, 3))
    copy, left = Tensor.copy_, [calls]

    def failing(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no memory")
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "copy_", failing)
    store.load_state_dict(other.state_dict(), assign=assign)
    monkeypatch.undo()
    assert torch.equal(store.keys, other.keys)
    assert torch.equal(store.values, other.values)
    store._check()


def test_a_load_that_repeatedly_runs_out_of_memory_is_completed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = rows_of_ones(trainable=True), rows_of_ones()
    other.update(other.ids, torch.zeros(6, 4), torch.zeros(6, 3))

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        raise MemoryError("no memory")

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(softdb.UnfinishedWriteError, match="no memory"):
        store.load_state_dict(other.state_dict())
    monkeypatch.undo()
    assert torch.equal(store.read(torch.ones(1, 4)).values, torch.zeros(1, 3))
    store._check()


@pytest.mark.parametrize("write", ["add", "put"])
def test_a_write_changes_nothing_if_the_storage_cannot_grow(write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows, left = rows_of_ones(), (torch.ones(20, 4), torch.ones(20, 3)), [2]
    install = Table.install

    def failing(*args: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise MemoryError("no memory")
        install(*args)

    monkeypatch.setattr(Table, "install", failing)
    with pytest.raises(MemoryError, match="no memory"):
        store.add(*rows) if write == "add" else store.put(torch.arange(20), *rows)
    assert len(store) == 6
    store.add(*rows)
    assert len(store) == 26
    store._check()


def test_assigned_ids_and_counters_become_int64_and_float64() -> None:
    state = rows_of_ones(track_usage=True).state_dict()
    state["rows.ids"], state["rows.weight"] = state["rows.ids"].int(), state["rows.weight"].half()
    store = SoftKVStore(4, 3, track_usage=True)
    store.load_state_dict(state, assign=True)
    store.add(torch.ones(1, 4), torch.ones(1, 3))
    assert (store.rows.ids.dtype, store.usage.weight.dtype) == (torch.int64, torch.float64)
    store._check()


@pytest.mark.parametrize(
    ("name", "value"), [("key_dim", 4.0), ("key_dim", torch.ones(2)), ("trainable", 0), ("capacity", 8)]
)
def test_settings_that_the_tensors_depend_on_cannot_be_assigned(name: str, value: Any) -> None:
    store = rows_of_ones()
    with pytest.raises(softdb.ArgumentError, match=f"{name}: expected .*, which the store was made with"):
        setattr(store, name, value)
    setattr(store, name, getattr(store, name))


def test_a_shallow_copy_leaves_the_store_usable_when_it_is_gone() -> None:
    store = rows_of_ones()
    copied = copy.copy(store)
    assert torch.equal(copied(torch.ones(4)), store(torch.ones(4)))
    del copied
    gc.collect()
    store.add(torch.ones(1, 4), torch.ones(1, 3))
    assert len(store) == 7
    store._check()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_pickles_a_store(protocol: int) -> None:
    store = pickle.loads(pickle.dumps(rows_of_ones(), protocol=protocol))
    assert store(torch.ones(4)).tolist() == [1.0, 1.0, 1.0]
    store.add(torch.ones(1, 4), torch.ones(1, 3))
    store._check()


def test_a_store_lives_while_it_is_written_to() -> None:
    writing = rows_of_ones().writing()
    gc.collect()
    with writing:
        pass


def test_a_replica_of_data_parallel_reads_its_own_tensors() -> None:
    store = SoftKVStore(2, 1, trainable=True)
    store.add(torch.eye(2), torch.ones(2, 1))
    replica = store._replicate_for_data_parallel()
    replica.keys, replica.values = store.keys * 1.0, store.values * 2.0
    assert replica(torch.ones(2)).item() == 2.0
    assert store(torch.ones(2)).item() == 1.0


def test_a_top_k_read_within_an_exact_one_sees_the_rows_that_were_loaded() -> None:
    torch.manual_seed(0)
    index = softdb.IndexConfig("IVF32,Flat", recall=1.0)
    store, other = (SoftKVStore(8, 1, metric="l2", index=index) for _ in range(2))
    store.add(torch.randn(5000, 8), torch.randn(5000, 1))
    other.add(torch.randn(4000, 8), torch.randn(4000, 1))
    query = torch.randn(64, 8)
    store.read(query, "topk", k=3)
    store.load_state_dict(other.state_dict())
    found = []

    def where(row: Mapping[str, Tensor]) -> Tensor:
        found.append(store.read(query, "topk", k=3).ids)
        return row["id"] >= 0

    wanted = store.read(query, k=3, where=where).ids
    assert torch.equal(found[0], wanted)
