"""Compaction: rows keep their contents and order, and everything by slot follows them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.tolerances import assert_close
from torch import Tensor, nn

import softdb
from softdb import ForeignWriteError, GrowthError, IndexConfig, SoftKVStore
from softdb.optim import RowAdagrad, RowAdam
from softdb.table.gradients import select_gradient

pytestmark = pytest.mark.each_device


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(rows: int = 12, **options: Any) -> SoftKVStore:
    """Create a store with free slots at the start, in the middle and at the end."""
    store = SoftKVStore(4, 3, fields=("time",), **options)
    store.add(normal(rows, 4), normal(rows, 3, seed=1), fields={"time": torch.arange(rows)})
    store.delete([0, 3, 4, rows - 1])
    return store


def rows_of(store: SoftKVStore) -> list[Tensor]:
    rows = store.get(store.ids)
    return [store.ids, rows.keys, rows.values, rows.fields["time"]]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("trainable", [True, False])
def test_rows_move_to_the_lowest_slots_in_their_order(capacity: int | None, trainable: bool) -> None:
    store = make(trainable=trainable, capacity=capacity)
    before, tensor, state = rows_of(store), store.keys, store.rows
    generations = state.generation[state.live_slots()]
    store.compact()
    store._check()
    assert store.rows.live_slots().tolist() == list(range(8))
    assert len(store.keys) == len(store.values) == (capacity or 8)
    assert (store.keys is tensor) == trainable
    assert_equal(rows_of(store), before)
    assert torch.equal(store.rows.generation[:8], generations)
    query = normal(5, 4, seed=2).double()
    expected = reference.read(query, before[1].double(), before[2].double())
    assert_close(store.read(query).values, expected.values, atol=1e-6, rtol=1e-5)
    ids = store.add(normal(3, 4), normal(3, 3), fields={"time": 0})
    assert ids.tolist() == [12, 13, 14]
    assert store.ids.tolist() == [*before[0].tolist(), 12, 13, 14]
    store._check()


def test_compaction_without_free_slots_changes_nothing_and_is_always_allowed() -> None:
    store = make(trainable=True)
    store.compact()
    read, version = store.read(normal(2, 4)), store.rows.version
    keys = store.keys.data_ptr()
    store.compact()
    assert store.rows.version == version
    assert store.keys.data_ptr() == keys
    read.values.sum().backward()


def test_an_empty_store_is_compacted_to_nothing() -> None:
    store = make(trainable=True)
    RowAdam(store.parameters()).step()
    store.delete(store.ids)
    store.compact()
    assert store.keys.shape == (0, 4)
    assert store.read(torch.ones(4)).values.tolist() == [0.0, 0.0, 0.0]
    assert store.add(normal(2, 4), normal(2, 3), fields={"time": 0}).tolist() == [12, 13]
    store._check()


def test_trimming_spare_storage_keeps_the_index() -> None:
    store = SoftKVStore(4, 3, index="IVF4,Flat", trainable=True)
    store.add(normal(100, 4), normal(100, 3))
    store.reserve(300)
    query = normal(20, 4, seed=3)
    store.read(query, "topk", k=3)
    store.compact()
    assert len(store.keys) == 100
    assert store.audit(query, k=3).mean_recall > 0.9
    assert store.index_stats().builds == 1
    store.add(normal(150, 4, seed=4), normal(150, 3))
    store._check()


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", IndexConfig("HNSW8", background=True)])
def test_topk_reads_follow_rows_to_other_slots(index: Any) -> None:
    store = SoftKVStore(4, 3, index=index)
    store.add(normal(200, 4), normal(200, 3))
    query = normal(20, 4, seed=3)
    store.read(query, "topk", k=3)
    store.delete(torch.arange(0, 200, 3))
    store.refresh(wait=True)
    store.compact()
    for _ in range(2):
        assert store.audit(query, k=3).mean_recall > 0.8
        store._check()
        store.refresh(wait=True)


@pytest.mark.parametrize("evict", ["lru", "oldest"])
def test_eviction_and_usage_follow_the_rows(evict: Any) -> None:
    def fill(compacts: bool) -> list[Any]:
        store = make(capacity=12, evict=evict, track_usage=True)
        with torch.no_grad():
            for seed in range(4):
                store.read(normal(2, 4, seed=seed), "topk", k=2)
        used = store.usage
        if compacts:
            store.compact()
        assert torch.equal(store.usage.reads, used.reads)
        assert torch.equal(store.usage.weight, used.weight)
        left = []
        for seed in range(9):
            store.add(normal(1, 4, seed=seed), normal(1, 3), fields={"time": 0})
            left.append(store.ids.sort().values.tolist())
            store._check()
        return left

    assert fill(True) == fill(False)


@pytest.mark.parametrize("capacity", [None, 12])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("kind", "options"), [(RowAdam, {"weight_decay": 0.2, "amsgrad": True}), (RowAdagrad, {})])
def test_training_goes_on_as_without_compaction(
    kind: type, options: dict[str, float], sparse: bool, capacity: int | None
) -> None:
    """Moments, step counts, pending decay and gradients follow the rows; new rows start with reset state."""

    def train(compacts: bool) -> dict[int, Tensor]:
        store = make(trainable=True, sparse_grad=sparse, capacity=capacity)
        optimizer = kind(store.parameters(), lr=0.1, **options)
        for step in range(8):
            optimizer.zero_grad()
            if step == 4:
                store.delete([7])
            store.read(normal(2, 4, seed=step), "topk", k=2).values.square().sum().backward()
            if step == 5 and compacts:
                store.compact()  # with pending gradients
            optimizer.step()
            if step == 5:
                store.add(normal(4, 4, seed=9), normal(4, 3, seed=9), fields={"time": 0})
        rows = store.get(store.ids)
        return dict(zip(store.ids.tolist(), torch.cat([rows.keys, rows.values], 1).detach(), strict=True))

    compacted, plain = train(True), train(False)
    assert compacted.keys() == plain.keys()
    for id, row in plain.items():
        assert torch.equal(compacted[id], row), id


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_the_state_of_a_copied_optimizer_follows(copied: Callable[[Any], Any]) -> None:
    store = make(trainable=True)
    optimizer = RowAdam(store.parameters())
    store.read(normal(2, 4)).values.sum().backward()
    optimizer.step()
    moments = optimizer.state[store.keys]["exp_avg"][store.rows.live_slots()]
    other, following = copied((store, optimizer))
    other.compact()
    assert torch.equal(following.state[other.keys]["exp_avg"], moments)
    assert len(optimizer.state[store.keys]["exp_avg"]) == 12


@pytest.mark.parametrize("sparse", [True, False])
def test_pending_gradients_follow_the_rows(sparse: bool) -> None:
    store = make(trainable=True, sparse_grad=sparse, capacity=15)
    store.read(normal(2, 4), "topk", k=3).values.sum().backward()
    before = [tensor.grad.to_dense()[store.rows.live_slots()] for tensor in (store.keys, store.values)]
    store.compact()
    for tensor, gradient in zip((store.keys, store.values), before, strict=True):
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad.layout == torch.sparse_coo) == sparse
        assert torch.equal(tensor.grad.to_dense()[:8], gradient)
        assert not tensor.grad.to_dense()[8:].any()
    store.read(normal(2, 4), "topk", k=3).values.sum().backward()  # accumulates


def test_selected_row_sparse_gradients_are_those_of_the_dense_ones() -> None:
    dense = normal(6, 2) * torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None]
    for slots in ([2, 3, 5, 0, 1], [5, 4, 1], []):
        chosen = torch.tensor(slots, dtype=torch.int64)
        found = select_gradient(dense.to_sparse(1), chosen)
        assert found.is_coalesced()
        assert (found.indices()[0].diff() > 0).all()
        assert torch.equal(found.to_dense(), dense[chosen])


# -- what forbids it ---------------------------------------------------------------------------------------


def assert_refused(store: SoftKVStore, error: type[Exception], message: str) -> None:
    state, version = copy.deepcopy(store.state_dict()), store.rows.version
    with pytest.raises(error, match=message):
        store.compact()
    assert store.rows.version == version
    for name, tensor in store.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    store._check()


@pytest.mark.parametrize("trainable", [True, False])
def test_an_open_read_forbids_compaction(trainable: bool) -> None:
    store = make(trainable=trainable)
    query = normal(2, 4).requires_grad_()
    read = store.read(query)
    assert_refused(store, GrowthError, "compact: expected no read that waits for its backward")
    read.values.sum().backward()
    del read
    store.compact()


def test_several_processes_forbid_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert_refused(make(trainable=True), GrowthError, "expected a single process.*DistributedDataParallel")
    make().compact()


@pytest.mark.parametrize(("kind", "capacity"), [(torch.optim.Adam, None), (torch.optim.Adafactor, 12)])
def test_the_state_of_another_optimizer_forbids_compaction(kind: Any, capacity: int | None) -> None:
    store = make(trainable=True, capacity=capacity)
    optimizer = kind(store.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    store.read(normal(2, 4)).values.sum().backward()
    optimizer.step()
    scheduler.step()
    assert_refused(store, GrowthError, f"rows of keys, got {type(optimizer).__name__}, which.*RowAdam")
    del optimizer, scheduler  # they refer to each other
    store.compact()
    kind(store.parameters()).step()


def test_an_optimizer_without_state_of_rows_goes_on() -> None:
    store = make(trainable=True)
    optimizer = torch.optim.SGD(store.parameters(), lr=0.1)
    for _ in range(2):
        store.read(normal(2, 4)).values.sum().backward()
        optimizer.step()
        store.compact()


@pytest.mark.cpu_only
def test_shared_memory_forbids_compaction() -> None:
    store = make(trainable=True)
    store.share_memory()
    assert_refused(store, GrowthError, r"keys: expected memory of this process.*before share_memory\(\)")
    copied = copy.deepcopy(store)
    copied.compact()
    assert_equal(rows_of(copied), rows_of(store))


@pytest.mark.parametrize("trainable", [True, False])
def test_another_store_with_the_same_tensor_forbids_compaction(trainable: bool) -> None:
    a, b = make(trainable=trainable), make(trainable=trainable)
    b.keys = a.keys
    for store in (a, b):
        assert_refused(store, ForeignWriteError, "keys: expected a tensor of this store alone")
    del b, store
    a.compact()


def test_substituted_tensors_forbid_compaction() -> None:
    store = make(trainable=True)
    tensors = {name: tensor.detach().clone() for name, tensor in store.named_parameters()}

    class Compacting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.store = store

        def forward(self) -> None:
            self.store.compact()

    with pytest.raises(ForeignWriteError, match="substituted"):
        torch.func.functional_call(Compacting(), {f"store.{name}": tensor for name, tensor in tensors.items()}, ())
    assert len(store.keys) == 12


def test_mapped_rows_are_compacted_once_they_are_in_memory(tmp_path: Path) -> None:
    store = make(trainable=True)
    store.save(tmp_path)
    mapped = SoftKVStore.load(tmp_path, mmap=True)
    with pytest.raises(softdb.ReadOnlyError, match="compact: expected a store in memory"):
        mapped.compact()
    mapped.materialize()
    mapped.compact()
    assert len(mapped.keys) == 8
    assert_equal(rows_of(mapped), rows_of(store))


# -- what follows ------------------------------------------------------------------------------------------


def test_snapshots_and_state_dicts_shrink_and_load(tmp_path: Path) -> None:
    store = make(trainable=True, evict=None, track_usage=True)
    before = rows_of(store)
    store.compact()
    assert len(store.state_dict()["keys"]) == 8
    store.save(tmp_path)
    loaded = SoftKVStore.load(tmp_path, device=store.device)
    assert len(loaded.keys) == 8
    other = make(20, trainable=True, track_usage=True)
    other.load_state_dict(store.state_dict())
    for each in (loaded, other, copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert_equal(rows_of(each), before)
        assert each.add(normal(1, 4), normal(1, 3), fields={"time": 0}).tolist() == [12]
        each._check()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [True, False])
def test_compiled_reads_go_on(trainable: bool) -> None:
    store = make(trainable=trainable)
    run = torch.compile(lambda query: store(query, mode="topk", k=3).sum(), backend="aot_eager", fullgraph=True)
    for compacts in (False, True):
        if compacts:
            store.compact()
        query, own = (normal(2, 4).requires_grad_() for _ in range(2))
        answer, expected = run(query), store(own, mode="topk", k=3).sum()
        assert_close(answer, expected)
        answer.backward()
        expected.backward()
        assert_close(query.grad, own.grad)
        del answer, expected


@pytest.mark.parametrize("kind", ["buffers", "parameters"])
def test_an_average_by_slot_of_a_compacted_store_is_an_error(kind: str) -> None:
    """The slots and their generations look alike before and after; the ids do not."""
    store = make(trainable=True, capacity=12)
    average = torch.optim.swa_utils.AveragedModel(store) if kind == "buffers" else copy.deepcopy(store)

    def update() -> None:
        if kind == "buffers":
            average.update_parameters(store)
        else:
            for mine, theirs in zip(average.parameters(), store.parameters(), strict=True):
                mine.detach().lerp_(theirs.detach(), 0.3)

    update()
    store.update(store.ids, values=normal(8, 3, seed=5))
    update()
    store.compact()
    with pytest.raises(ForeignWriteError, match=r"mixes two rows.*update_average"):  # noqa: PT012
        update()
        list(average.parameters())
        average(normal(2, 4))
