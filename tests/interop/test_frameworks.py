"""Stores in other frameworks: averages, checkpoints, wrappers, conversions. See docs/frameworks.md."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks
from support.programs import run_ranks
from support.versions import TORCH_RELEASE
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import softdb
from softdb import ForeignWriteError, IndexConfig, SoftKVStore
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdam, update_average

EMA = get_ema_multi_avg_fn(0.9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(rows: int = 6, *, capacity: int | None = 20, seed: int = 0, **options: Any) -> SoftKVStore:
    store = SoftKVStore(4, 3, capacity=capacity, **{"trainable": True, "fields": ("time",)} | options)
    store.add(normal(rows, 4, seed=seed), normal(rows, 3, seed=seed + 1), fields={"time": torch.arange(rows)})
    return store


def add(store: SoftKVStore, count: int, seed: int = 9) -> Tensor:
    return store.add(normal(count, 4, seed=seed), normal(count, 3, seed=seed + 1), fields={"time": 7})


def rows_of(store: SoftKVStore) -> dict[int, tuple[Tensor, Tensor]]:
    rows = store.get(store.ids)
    return {int(id): (key, value) for id, key, value in zip(store.ids, rows.keys, rows.values, strict=True)}


def assert_same_rows(one: SoftKVStore, other: SoftKVStore) -> None:
    mine, theirs = rows_of(one), rows_of(other)
    assert mine.keys() == theirs.keys()
    for id, (key, value) in mine.items():
        torch.testing.assert_close((key, value), theirs[id])


# -- AveragedModel and SWA -------------------------------------------------------------------------------


@pytest.mark.parametrize("updates_before", [0, 1])
@pytest.mark.filterwarnings("ignore:average. expected averages that start from the rows")
def test_an_averaged_store_follows_ids(updates_before: int) -> None:
    store = make()
    average = AveragedModel(store)
    for _ in range(updates_before):
        average.update_parameters(store)
    add(store, 3)
    store.delete([2])
    average.update_parameters(store)
    copied = average.module
    assert len(copied) == 8
    assert 2 not in copied
    assert 8 in copied
    assert copied.ids.tolist() == store.ids.tolist()
    assert copied.read(normal(3, 4), "topk", k=8).ids.sort(-1).values.tolist() == [store.ids.tolist()] * 3
    copied._check()


def test_the_first_update_of_an_average_copies_rows_in_reused_slots() -> None:
    store = make()
    average = AveragedModel(store)
    store.delete([2])
    add(store, 2)
    average.update_parameters(store)
    assert_same_rows(average.module, store)
    average.module._check()


def test_an_average_that_mixes_two_rows_is_an_error() -> None:
    store = make()
    average = AveragedModel(store, multi_avg_fn=EMA)
    average.update_parameters(store)
    assert len(average.module) == 6
    store.delete([2])
    add(store, 1)  # in the slot of row 2
    average.update_parameters(store)
    for use in (
        lambda: average(normal(2, 4)),
        lambda: average.module.read(normal(2, 4), "topk", k=2),
        lambda: len(average.module),
        lambda: average.module.get([0]),
        lambda: average.module.delete([0]),
        lambda: average.module.state_dict(),
    ):
        with pytest.raises(ForeignWriteError, match=r"mixes two rows in each of 1 slots \(ids 6\).*update_average"):
            use()
    average.module.load_state_dict(store.state_dict())
    assert_same_rows(average.module, store)


def test_an_average_of_a_revived_row_is_an_error() -> None:
    store = make()
    average = AveragedModel(store, multi_avg_fn=EMA)
    average.update_parameters(store)
    store.revive([3], normal(1, 4, seed=5), normal(1, 3, seed=6))
    average.update_parameters(store)
    average.update_parameters(store)
    with pytest.raises(ForeignWriteError, match=r"\(ids 3\).*update_average"):
        average(normal(2, 4))


def test_rows_that_come_into_an_average_begin_with_zeros_and_a_warning() -> None:
    store = make()
    average = AveragedModel(store, multi_avg_fn=EMA)
    average.update_parameters(store)
    assert len(average.module) == 6
    add(store, 1)
    average.update_parameters(store)
    with pytest.warns(UserWarning, match=r"got 1 that started from zero.*update_average"):
        assert 6 in average.module
    torch.testing.assert_close(average.module.get([6]).keys, 0.1 * store.get([6]).keys)


def test_averaged_ids_are_an_error() -> None:
    for rows in (60, 5):
        store = make(rows, capacity=80)
        average = AveragedModel(store, multi_avg_fn=EMA, use_buffers=True)
        average.update_parameters(store)
        average(normal(2, 4))
        add(store, 2)
        average.update_parameters(store)
        with pytest.raises(ForeignWriteError, match=r"averaged or overwritten.*use_buffers=True.*update_average"):
            average(normal(2, 4))


def test_an_average_without_changes_of_rows_is_one_of_keys_and_values() -> None:
    store = make(track_usage=True)
    average = AveragedModel(store, multi_avg_fn=EMA)
    average.update_parameters(store)
    before = rows_of(average.module)
    with torch.no_grad():
        store.keys[:6].add_(1.0)
    store.read(normal(2, 4), "topk", k=2)  # counts uses
    average.update_parameters(store)
    after = rows_of(average.module)
    for id, (key, _) in before.items():
        torch.testing.assert_close(after[id][0], key + 0.1)
    average.module._check()


def test_an_averages_index_is_never_stale() -> None:
    store = SoftKVStore(8, 2, trainable=True, sparse_grad=True, index="IVF16,Flat")
    store.add(normal(2000, 8), normal(2000, 2, seed=1))
    average = AveragedModel(store, multi_avg_fn=EMA)
    average.update_parameters(store)
    queries = normal(64, 8, seed=4)
    for step in range(3):
        assert average.module.audit(queries, k=5).mean_recall > 0.9
        with torch.no_grad():
            store.keys.copy_(normal(2000, 8, seed=5 + step))
        average.update_parameters(store)
    assert average.module.audit(queries, k=5).mean_recall > 0.9


def test_growth_ends_an_averaged_model_with_torchs_own_error() -> None:
    store = make(6, capacity=None)
    average = AveragedModel(store)
    average.update_parameters(store)
    add(store, 30)
    with pytest.raises(RuntimeError, match=r"size of tensor|must match"):
        average.update_parameters(store)


def test_stochastic_weight_averaging_trains_on() -> None:
    store = make(12)
    optimizer = torch.optim.SGD(store.parameters(), lr=0.1)
    average, schedule = AveragedModel(store), SWALR(optimizer, swa_lr=0.05)
    total = torch.zeros(20, 4)
    for _ in range(4):
        optimizer.zero_grad()
        store(normal(4, 4)).square().sum().backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(store)
        total += store.keys.detach()
    torch.testing.assert_close(average.module.keys.detach(), total / 4)
    average.module._check()


def test_a_copy_made_in_inference_mode_is_whole() -> None:
    store = make()
    with torch.inference_mode():
        copied = copy.deepcopy(store)
        assert len(copied) == len(list(copied.parameters())) + 4
        copied(normal(2, 4))
    assert_same_rows(copied, store)
    copied._check()


# -- softdb's own average --------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("trainable", [True, False])
def test_update_average_averages_by_id(capacity: int | None, trainable: bool) -> None:
    store = make(10, capacity=capacity, trainable=trainable, track_usage=True)
    average, expected = copy.deepcopy(store), rows_of(store)
    for step in range(5):
        store.delete([step])
        add(store, 4, seed=20 + step)  # growth, reused slots, new ones
        store.update([8], keys=normal(1, 4, seed=step))
        if step == 2:
            store.revive([9], normal(1, 4, seed=50), normal(1, 3, seed=51))
            store.delete([7])
            store.compact()  # row 9 moves
        store.read(normal(2, 4), "topk", k=2)
        update_average(average, store, 0.75)
        for id, (key, value) in rows_of(store).items():
            if id in expected and not (step == 2 and id == 9):
                key = 0.75 * expected[id][0] + 0.25 * key
                value = 0.75 * expected[id][1] + 0.25 * value
            expected[id] = key, value
        expected = {id: row for id, row in expected.items() if id in store}
        assert rows_of(average).keys() == expected.keys()
        for id, row in rows_of(average).items():
            torch.testing.assert_close(row, expected[id])
        assert torch.equal(average.usage.reads, store.usage.reads)
        assert torch.equal(average.get(average.ids).fields["time"], store.get(store.ids).fields["time"])
        average._check()
        assert torch.isin(average.read(normal(3, 4), "topk", k=3).ids, store.ids).all()


class Model(nn.Module):
    """A model with a store and every other kind of member."""

    def __init__(self, store: SoftKVStore) -> None:
        super().__init__()
        self.linear, self.norm, self.store, self.again = nn.Linear(4, 4), nn.BatchNorm1d(4), store, store
        self.memory = MemoryLayer(4, rows=8, heads=2, key_dim=4)
        self.product = ProductKeyMemory(4, rows=16, heads=1, k=2, key_dim=4)
        self.context = ContextMemory(4, rows=8, heads=1, key_dim=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.store(self.norm(self.linear(x)))
        return y


@pytest.mark.parametrize("wrapped", [False, True])
def test_update_average_of_a_model_that_holds_stores(wrapped: bool) -> None:
    model = Model(make(8, capacity=None))
    average: nn.Module = AveragedModel(model) if wrapped else copy.deepcopy(model)
    averaged = average.module if wrapped else average
    model(normal(5, 4))
    before = {name: parameter.detach().clone() for name, parameter in averaged.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    add(model.store, 30)
    update_average(average, model, 0.9)
    assert averaged.again is averaged.store
    assert len(averaged.store) == 38
    for name, parameter in averaged.named_parameters():
        if not name.startswith("store."):
            torch.testing.assert_close(parameter.detach(), before[name] + 0.1)
    torch.testing.assert_close(averaged.store.get([3]).keys, before["store.keys"][3:4] + 0.1)
    torch.testing.assert_close(averaged.store.get([30]).keys, model.store.get([30]).keys)
    assert torch.equal(averaged.norm.running_mean, model.norm.running_mean)
    assert int(averaged.norm.num_batches_tracked) == 1
    if wrapped:
        assert int(average.n_averaged) == 1
    averaged.store._check()


def test_update_average_keeps_small_steps_in_a_wider_average() -> None:
    store = make(4, dtype=torch.bfloat16)
    average = copy.deepcopy(store).float()
    with torch.no_grad():
        store.keys.add_(1.0)
    start = average.get([0]).keys
    update_average(average, store, 0.999)
    assert average.keys.dtype == torch.float32
    torch.testing.assert_close(average.get([0]).keys, start + 0.001 * (store.get([0]).keys.float() - start))


def test_update_average_follows_the_index() -> None:
    store = SoftKVStore(8, 2, trainable=True, sparse_grad=True, index="IVF16,Flat")
    store.add(normal(2000, 8), normal(2000, 2, seed=1))
    average = copy.deepcopy(store)
    queries = normal(64, 8, seed=4)
    for step in range(3):
        assert average.audit(queries, k=5).mean_recall > 0.9
        with torch.no_grad():
            store.keys[:2000].copy_(normal(2000, 8, seed=5 + step))
        if step == 1:
            store.delete(store.ids[:100])
            store.add(normal(300, 8, seed=7), normal(300, 2, seed=8))
        update_average(average, store, 0.5)
    assert average.audit(queries, k=5).mean_recall > 0.9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, m: (m, m, 0.5), softdb.ArgumentError, "average: expected a copy of the model"),
        (lambda a, m: (a, m, 1.5), softdb.ArgumentError, "decay: expected a number from 0 to 1, got 1.5"),
        (lambda a, m: (a, m, float("nan")), softdb.ArgumentError, "decay: expected a number from 0 to 1, got nan"),
        (lambda a, m: (a, m, "x"), softdb.DtypeError, "decay: expected a number"),
        (lambda a, m: (a, m.state_dict(), 0.5), softdb.DtypeError, "model: expected a module"),
        (lambda a, m: (make(3), m, 0.5), softdb.ArgumentError, "average: expected stores at"),
        (lambda a, m: (Model(make(3, capacity=9)), m, 0.5), softdb.ArgumentError, "a store with capacity=20"),
    ],
)
def test_update_average_refuses(change: Callable[..., Any], error: type[Exception], message: str) -> None:
    model = Model(make())
    average = copy.deepcopy(model)
    state = copy.deepcopy(average.state_dict())
    with pytest.raises(error, match=message):
        update_average(*change(average, model))
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_averages_of_stores_that_share_keys_average_once() -> None:
    a, b = make(), make()
    b.keys = a.keys
    model = nn.ModuleList([a, b])
    average = copy.deepcopy(model)
    start = average[0].get([0]).keys
    a.update([0], keys=torch.zeros(1, 4))
    update_average(average, model, 0.5)
    torch.testing.assert_close(average[0].get([0]).keys, 0.5 * start)
    assert average[0].keys is average[1].keys


def test_an_average_that_is_refused_has_changed_no_store() -> None:
    model = nn.ModuleList([make(16, capacity=None), make(16, capacity=None)])
    average = copy.deepcopy(model)
    start = average[0].get([0]).keys
    model[0].update([0], keys=torch.zeros(1, 4))
    add(model[1], 30)
    read = average[1].read(normal(1, 4))
    with pytest.raises(softdb.GrowthError, match="the storage must grow"):
        update_average(average, model, 0.5)
    del read
    update_average(average, model, 0.5)
    torch.testing.assert_close(average[0].get([0]).keys, 0.5 * start)


def test_two_threads_may_average_two_stores_from_each_other() -> None:
    a, b = make(), make()
    b = copy.deepcopy(a)

    def work(one: SoftKVStore, other: SoftKVStore) -> None:
        for _ in range(50):
            update_average(one, other, 0.5)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in ((a, b), (b, a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    a._check()


def test_update_average_refuses_meta_tensors_and_the_store_of_the_model() -> None:
    store = make()
    with pytest.raises(softdb.DeviceError, match=r"model: .*to_empty"):
        update_average(copy.deepcopy(store), copy.deepcopy(store).to("meta"), 0.5)
    model = nn.Sequential(store)
    with pytest.raises(
        softdb.ArgumentError, match="average: expected a copy of each store, got the model's own store at '0'"
    ):
        update_average(copy.copy(model), model, 0.5)


# -- more of AveragedModel -------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("rows", [5, 300])
def test_an_average_with_buffers_is_right_or_an_error(decay: float, rows: int) -> None:
    store = make(rows, capacity=400)
    average = AveragedModel(store, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(8):
        average.update_parameters(store)
    altered = not torch.equal(average.module.rows.ids, store.rows.ids)
    expected = pytest.raises(ForeignWriteError, match="update_average") if altered else nullcontext()
    with expected:
        assert average.module.ids.tolist() == store.ids.tolist()
        average.module._check()


def test_averaged_ids_that_are_copied_by_data_are_an_error_and_no_rows_are_lost() -> None:
    store = make(300, capacity=400)
    state = copy.deepcopy(store.state_dict())
    average = AveragedModel(store, multi_avg_fn=EMA, use_buffers=True)
    for _ in range(8):
        average.update_parameters(store)
    both = [itertools.chain(module.parameters(), module.buffers()) for module in (average.module, store)]
    for mine, theirs in zip(*both, strict=True):
        theirs.data.copy_(mine.data)  # as Lightning does
    for use in (lambda: 5 in store, lambda: store(normal(2, 4)), store.cpu, lambda: store.double()):
        with pytest.raises(ForeignWriteError, match="update_average"):
            use()
    store.load_state_dict(state)
    assert len(store) == 300
    store.rows.ids.data[3] = 777
    with pytest.raises(ForeignWriteError, match=r"rows\.ids"):
        store.cpu()


def test_resumed_averages_count_as_updated() -> None:
    def begin() -> tuple[SoftKVStore, Any]:
        store = make()
        average = AveragedModel(store, multi_avg_fn=EMA)
        average.update_parameters(store)
        average.update_parameters(store)
        return store, average

    def replace(store: SoftKVStore) -> None:
        store.delete([0])
        add(store, 1)

    store, average = begin()
    replace(store)
    saved = copy.deepcopy((store.state_dict(), average.state_dict()))
    resumed = make(0)
    again = AveragedModel(resumed, multi_avg_fn=EMA)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    again.update_parameters(resumed)
    with pytest.raises(ForeignWriteError, match="mixes two rows"):
        again(normal(2, 4))
    for copied in (copy.deepcopy, lambda average: pickle.loads(pickle.dumps(average))):
        store, average = begin()
        average.multi_avg_fn = None  # a closure cannot be pickled
        other = copied(average)
        replace(store)
        other.update_parameters(store)
        with pytest.raises(ForeignWriteError, match="mixes two rows"):
            other(normal(2, 4))


def test_a_row_in_a_reused_slot_is_a_mixture() -> None:
    store = make()
    average = AveragedModel(store, multi_avg_fn=EMA)
    average.update_parameters(store)
    store.delete([0])
    average.update_parameters(store)
    add(store, 1)
    average.update_parameters(store)
    with pytest.raises(ForeignWriteError, match=r"\(ids 6\)"):
        average(normal(2, 4))


def test_averaged_fields_and_revived_rows_are_an_error_with_buffers() -> None:
    for write in (
        lambda store: store.update([1], fields={"time": [8]}),
        lambda store: store.revive([0], normal(1, 4), normal(1, 3)),
    ):
        store = make()
        average = AveragedModel(store, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        average.update_parameters(store)
        write(store)
        average.update_parameters(store)
        with pytest.raises(ForeignWriteError, match="update_average"):
            average.module.get([1])


def test_reads_of_an_average_are_stale_only_by_rows_that_they_used() -> None:
    store = make(3000, capacity=None)
    average = AveragedModel(store)
    for step in range(30):
        store.update([0, 1, 2], keys=normal(3, 4, seed=step))
    average.update_parameters(store)
    copied = average.module
    copied._check()
    read = copied.read(normal(2, 4), "topk", k=2, where=torch.tensor([0, 1, 2]))
    for step in range(3):
        copied.update(range(100, 2600), values=normal(2500, 3, seed=step))
    read.values.sum().backward()


# -- Lightning -------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> Tensor:
        return normal(4, seed=place)


def average_parameters(average: SoftKVStore, store: SoftKVStore, rate: float) -> None:
    for mine, theirs in zip(average.parameters(), store.parameters(), strict=True):
        mine.detach().lerp_(theirs.detach(), rate)


def average_in_place(average: SoftKVStore, store: SoftKVStore, rate: float) -> None:
    with torch.no_grad():
        for mine, theirs in zip(list(average.parameters()), list(store.parameters()), strict=True):
            mine.mul_(1 - rate).add_(theirs, alpha=rate)


def average_state(average: SoftKVStore, store: SoftKVStore, rate: float) -> None:
    for mine, theirs in zip(average.state_dict().values(), store.state_dict().values(), strict=True):
        mine.copy_(mine + rate * (theirs - mine) if mine.is_floating_point() else theirs)


AVERAGES = [average_parameters, average_in_place, average_state]


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [(torch.float32, 0.5), (torch.float32, 1e-3), (torch.float64, 0.1), (torch.bfloat16, 0.5), (torch.bfloat16, 0.1)],
)
@pytest.mark.parametrize("update", AVERAGES)
def test_an_average_of_parameters_alone_that_mixes_rows_is_an_error(update: Any, rate: float, dtype: Any) -> None:
    store = make(6, dtype=dtype)
    average = copy.deepcopy(store)
    update(average, store, rate)
    store.delete([2, 4])
    add(store, 2)  # in their slots
    update(average, store, rate)
    kept = rows_of(store)
    with pytest.raises(ForeignWriteError, match=r"mixes two rows in each of 2 slots \(ids 6, 7\).*update_average"):
        update(average, store, rate)
    assert_same_rows(store, copy.deepcopy(store))
    assert rows_of(store).keys() == kept.keys()
    with pytest.raises(ForeignWriteError, match="update_average"):
        average(normal(2, 4).to(dtype))
    average.load_state_dict(store.state_dict())
    update(average, store, rate)
    update(average, store, rate)
    assert_same_rows(average, store)


@pytest.mark.parametrize("update", AVERAGES)
def test_an_average_of_parameters_alone_may_begin_with_a_copy_of_other_rows(update: Any) -> None:
    store = make(6)
    average = copy.deepcopy(store)
    store.delete([2])
    add(store, 2)
    update(average, store, 1.0)
    for _ in range(3):
        with torch.no_grad():
            store.keys.add_(0.1)
        update(average, store, 0.2)
    store.delete([5])
    for _ in range(3):
        update(average, store, 0.2)
    add(store, 1)
    update(average, store, 0.2)
    if update is average_state:  # The average follows the ids and clears deleted rows.
        with pytest.warns(UserWarning, match="got 1 that started from zero"):
            update(average, store, 0.2)
    else:
        with pytest.raises(ForeignWriteError, match=r"1 slots \(ids 8\)"):
            update(average, store, 0.2)


def test_rows_that_come_into_an_average_of_parameters_alone_begin_with_zeros_and_a_warning() -> None:
    store = make(6)
    average = copy.deepcopy(store)
    add(store, 3)
    average_parameters(average, store, 0.3)
    with pytest.warns(UserWarning, match=r"got 3 that started from zero.*update_average"):
        average_parameters(average, store, 0.3)
    average_parameters(average, store, 0.3)


def test_a_copy_that_is_trained_by_hand_is_no_average() -> None:
    store = make(6)
    copied = copy.deepcopy(store)
    store.delete([2])
    add(store, 2)
    for step in range(5):
        copied.zero_grad()
        copied(normal(3, 4, seed=step)).square().sum().backward()
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter -= 0.1 * parameter.grad
    assert len(copied) == 6
    copied._check()


def test_an_average_of_a_fixed_stores_state_that_mixes_rows_is_an_error() -> None:
    store = make(6, trainable=False)
    average = copy.deepcopy(store)
    store.put([3], normal(1, 4, seed=7), normal(1, 3, seed=8), fields={"time": 3})  # stays the row that it is
    store.delete([0])
    add(store, 1)
    average_state(average, store, 0.2)
    with pytest.raises(ForeignWriteError, match=r"1 slots \(ids 6\).*update_average"):
        average_state(average, store, 0.2)


def test_averages_by_id_are_not_taken_for_averages_of_parameters_alone() -> None:
    store = make(6)
    average = copy.deepcopy(store)
    for step in range(4):
        store.delete([step])
        add(store, 1, seed=step)
        update_average(average, store, 0.9)
    assert average.ids.sort().values.tolist() == store.ids.sort().values.tolist()
    average._check()


def test_a_copy_does_not_keep_its_source_alive() -> None:
    store = make(6)
    average = copy.deepcopy(store)
    reference = weakref.ref(store)
    del store
    assert reference() is None
    assert len(list(average.parameters())) == 2


def trained_by_lightning(callback: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Train a store that gets a row at each step; return the module and the average's."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.store = make(8, capacity=40, **options)
            self.automatic_optimization = True
            self.seen: list[int] = []

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            return self.store(batch).square().mean()

        def on_train_batch_end(self, *args: Any) -> None:
            if replacing and self.current_epoch <= last_epoch_that_replaces:
                self.store.delete(self.store.ids[:1])
                add(self.store, 1, seed=int(self.global_step))

        def validation_step(self, batch: Tensor, number: int) -> None:
            self.seen.append(len(self.store))
            assert torch.isin(self.store.read(batch, "topk", k=3).ids, self.store.ids).all()
            self.store._check()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    replacing, last_epoch_that_replaces = options.pop("replacing", False), options.pop("until", 99)
    epochs = options.pop("epochs", 2)
    module = Module()
    loader = torch.utils.data.DataLoader(Examples(), batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        trainer.fit(module, loader, loader)
    return module, trainer


def averaging(name: str) -> Any:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    return getattr(callbacks, name)


@pytest.mark.slow
def test_lightnings_averages_of_parameters_follow_a_store_that_stays(tmp_path: Path) -> None:
    callback = averaging("EMAWeightAveraging")(decay=0.9, use_buffers=False)
    module, _ = trained_by_lightning(callback, tmp_path)
    assert module.seen
    assert set(module.seen) == {8}
    module.store._check()
    assert module.store.audit(normal(4, 4), k=3).mean_recall == 1.0


@pytest.mark.slow
def test_lightnings_averages_name_the_remedy_where_rows_are_replaced(tmp_path: Path) -> None:
    callback = averaging("EMAWeightAveraging")(decay=0.9, use_buffers=False)
    with pytest.raises(ForeignWriteError, match="update_average"):
        trained_by_lightning(callback, tmp_path, replacing=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging"])
def test_lightnings_default_averages_of_buffers_name_the_remedy(name: str, tmp_path: Path) -> None:
    callback = averaging(name)(
        **({"decay": 0.9} if name.startswith("EMA") else {"avg_fn": lambda a, m, n: 0.9 * a + 0.1 * m})
    )
    with pytest.raises(ForeignWriteError, match=r"use_buffers=True.*update_average|update_average"):
        trained_by_lightning(callback, tmp_path, replacing=True)


def stochastic_averaging() -> Any:
    return averaging("StochasticWeightAveraging")(swa_lrs=0.01, swa_epoch_start=2)


@pytest.mark.slow
def test_lightnings_stochastic_averages_of_a_store_that_stays_are_right(tmp_path: Path) -> None:
    callback, seen = stochastic_averaging(), []
    update = callback.update_parameters

    def record(average: Any, module: Any, *args: Any) -> None:
        seen.append(module.store.keys.detach().clone())
        update(average, module, *args)

    callback.update_parameters = record
    # The rows that are replaced before averages begin are no matter.
    module, _ = trained_by_lightning(callback, tmp_path, replacing=True, until=0, epochs=4)
    assert len(seen) == 3
    torch.testing.assert_close(module.store.keys.detach(), torch.stack(seen).mean(0))
    module.store._check()
    assert module.store.audit(normal(4, 4), k=3).mean_recall == 1.0


@pytest.mark.parametrize("epochs", [3, 5])
@pytest.mark.slow
def test_lightnings_stochastic_averages_name_the_remedy_where_rows_are_replaced(tmp_path: Path, epochs: int) -> None:
    with pytest.raises(ForeignWriteError, match=r"mixes two rows.*update_average"):
        trained_by_lightning(stochastic_averaging(), tmp_path, replacing=True, epochs=epochs)


# -- checkpoints, in place and by the loader -------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by torch's own code, in 2.8
def test_a_distributed_checkpoint_that_is_loaded_in_place_is_followed_at_once(tmp_path: Path, trainable: bool) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    options: dict[str, Any] = {"trainable": trainable, "capacity": 30, "evict": "lru", "track_usage": True}
    store, other, third = make(12, **options), make(3, seed=5, **options), make(3, seed=5, **options)
    store.delete([4])
    store.read(normal(3, 4), "topk", k=2)
    other.read(normal(3, 4), "topk", k=2)
    for each in (other, third):
        dcp.save(store.state_dict(), checkpoint_id=tmp_path / str(id(each)))
        state = each.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / str(id(each)))
    assert len(other) == 11
    assert 4 not in other
    assert 11 in other
    assert third.ids.tolist() == store.ids.tolist()  # the first thing asked for
    assert_same_rows(other, store)
    assert torch.equal(other.usage.reads, store.usage.reads)
    query = normal(3, 4, seed=3)
    assert torch.equal(other.read(query, "topk", k=4).ids, store.read(query, "topk", k=4).ids)
    assert add(other, 1).tolist() == add(store, 1).tolist() == [12]
    for each in (store, other):
        add(each, 25)
    assert other.ids.tolist() == store.ids.tolist()  # the same were evicted
    other._check()


def repeat_ids_by_data(store: SoftKVStore) -> None:
    store.rows.ids.data.fill_(3)
    store.rows.next_id.data.add_(1)


@pytest.mark.parametrize(
    "corrupt", [lambda store: store.rows.ids.fill_(3), lambda store: store.rows.ids.sub_(5), repeat_ids_by_data]
)
def test_ids_that_name_no_rows_are_an_error_until_a_state_is_loaded(corrupt: Callable[[SoftKVStore], object]) -> None:
    store = make(8)
    state = copy.deepcopy(store.state_dict())
    corrupt(store)
    for use in (lambda: store(normal(2, 4)), lambda: len(store), lambda: add(store, 1), lambda: store.ids):
        with pytest.raises(ForeignWriteError, match=r"rows\.ids: expected the ids of rows"):
            use()
    assert "rows=8" in repr(store)
    store.load_state_dict(state)
    assert len(store) == 8
    store._check()


def test_buffers_written_in_place_are_followed() -> None:
    store, other = make(8, evict="oldest"), make(12, seed=3, evict="oldest")
    other.delete([0, 5])
    for name, tensor in other.state_dict().items():
        store.state_dict()[name].copy_(tensor)
    assert len(store) == 10
    assert 5 not in store
    assert add(store, 1).tolist() == [12]
    assert store.audit(normal(3, 4), k=3).mean_recall == 1.0
    store._check()


# -- keys that are written to unnoticed ------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("factory", ["IVF16,Flat", "HNSW16"])
def test_keys_written_through_data_are_detected_by_a_sample_and_reported_once(trainable: bool, factory: str) -> None:
    store = SoftKVStore(8, 2, trainable=trainable, index=IndexConfig(factory, recall=0.9))
    store.add(normal(4000, 8), normal(4000, 2, seed=1))
    queries = normal(128, 8, seed=4)
    store.read(queries, "topk", k=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            store.keys.data.mul_(0.1).add_(normal(4000, 8, seed=5 + step), alpha=0.9)
            read = store.read(queries, "topk", k=5)
            best = store.read(queries, "exact", k=5)
            assert torch.isin(read.ids, best.ids).double().mean() > 0.8
            assert store.audit(queries, k=5).mean_recall > 0.85
    (warning,) = caught
    assert "got a write through .data or NumPy" in str(warning.message)
    assert "store.touch(ids)" in str(warning.message)
    store._check()


def test_recorded_writes_cause_no_warning() -> None:
    store = SoftKVStore(8, 2, trainable=True, sparse_grad=True, index="IVF16,Flat")
    ids = store.add(normal(2000, 8), normal(2000, 2, seed=1))
    optimizer = RowAdam(store.parameters(), lr=0.3)
    for step in range(6):
        optimizer.zero_grad()
        store.read(normal(32, 8, seed=step), "topk", k=5).values.sum().backward()
        optimizer.step()
        if step == 3:
            store.update(ids[:50], keys=normal(50, 8, seed=6))
            store.delete(ids[50:60])
        if step == 4:
            store.keys.data[100:200] = normal(100, 8, seed=7)
            store.touch(ids[100:200])
    assert store.audit(normal(32, 8, seed=1), k=5).mean_recall > 0.9


# -- tensors that replace those of a store --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"mode": "topk", "k": 3}, {"mode": "hard"}], ids=str)
def test_a_functional_call_leaves_earlier_reads_alone(options: dict[str, Any]) -> None:
    store, again = make(), make()
    read, expected = store.read(normal(2, 4), **options), again.read(normal(2, 4), **options)
    replacements = {name: tensor.detach() + 1 for name, tensor in store.named_parameters()}
    other = torch.func.functional_call(store, replacements, (normal(2, 4),), options)
    plain = make(0)
    plain.load_state_dict(store.state_dict() | replacements)
    torch.testing.assert_close(other, plain(normal(2, 4), **options))
    read.values.square().sum().backward()
    expected.values.square().sum().backward()
    assert torch.equal(store.values.grad.to_dense(), again.values.grad.to_dense())
    store._check()
    add(store, 1)


def test_a_functional_read_is_stale_only_if_its_tensors_are_written_to() -> None:
    store = make()
    replacements = {name: tensor.detach().clone().requires_grad_() for name, tensor in store.named_parameters()}
    before, after = (
        torch.func.functional_call(store, replacements, (normal(2, 4),), {"mode": "topk", "k": 2}) for _ in "ab"
    )
    store.update([0, 1, 2, 3, 4, 5], keys=torch.zeros(6, 4))
    before.sum().backward()
    assert replacements["keys"].grad is not None
    with torch.no_grad():
        replacements["values"].add_(1.0)
    with pytest.raises(softdb.StaleReadError, match="substituted for the store's own"):
        after.sum().backward()


def test_a_write_within_a_functional_call_is_an_error() -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.store = make()

        def forward(self) -> Tensor:
            return add(self.store, 1)

    writer = Writer()
    replacements = {name: tensor.detach().clone() for name, tensor in writer.named_parameters()}
    with pytest.raises(ForeignWriteError, match=r"keys: expected the store's own tensor to write to"):
        torch.func.functional_call(writer, replacements, ())
    assert len(writer.store) == 6
    assert len(add(writer.store, 1)) == 1


def test_a_functional_call_with_buffers_of_other_rows_is_an_error() -> None:
    store, other = make(6), make(8)
    copies = {name: tensor.clone() for name, tensor in store.named_buffers()}
    torch.testing.assert_close(torch.func.functional_call(store, copies, (normal(2, 4),)), store(normal(2, 4)))
    with pytest.raises(ForeignWriteError, match=r"rows\.\w+: expected the store's own buffer or a copy"):
        torch.func.functional_call(store, dict(other.named_buffers()), (normal(2, 4),))
    store._check()


def test_growth_of_a_store_that_shares_its_keys_is_an_error_of_the_other() -> None:
    a, b = make(6, capacity=None), make(6, capacity=None, seed=3)
    b.keys = a.keys
    assert torch.equal(b.get([2]).keys, a.get([2]).keys)
    optimizer = torch.optim.SGD([a.keys], lr=0.1)
    for store in (a, b):
        optimizer.zero_grad()
        store.read(normal(2, 4), "topk", k=2).values.sum().backward()
        optimizer.step()  # moves the rows of both
        assert a.audit(normal(3, 4), k=2).mean_recall == b.audit(normal(3, 4), k=2).mean_recall == 1.0
    add(a, 30)
    for use in (
        lambda: b(normal(2, 4)),
        lambda: b.read(normal(2, 4), "topk", k=2),
        lambda: add(b, 1),
        lambda: b.get([0]),
    ):
        with pytest.raises(ForeignWriteError, match=r"keys: expected shape \(6, 4\), got \(36, 4\).*reserve"):
            use()
    a._check()


def test_a_write_to_a_store_is_followed_by_one_that_shares_its_keys() -> None:
    for trainable in (True, False):
        a, b = (SoftKVStore(8, 2, trainable=trainable, index=index) for index in ("Flat", "IVF16,Flat"))
        for store in (a, b):
            store.add(normal(2000, 8), normal(2000, 2, seed=1))
        b.keys = a.keys
        b.read(normal(64, 8, seed=4), "topk", k=5)
        query = torch.ones(1, 8, requires_grad=True)
        read = b.read(query)
        a.update([7], keys=20 * torch.ones(1, 8))
        assert b.read(query, "topk", k=1).ids.tolist() == [[7]]
        with pytest.raises(softdb.StaleReadError):
            read.values.sum().backward()
        a.delete([8])  # sets the shared keys to zero, also for the row of b
        assert b.get([8]).keys.count_nonzero() == 0


def test_a_store_whose_values_are_its_keys() -> None:
    store = SoftKVStore(8, 8, trainable=True, sparse_grad=True, index="IVF16,Flat")
    store.reserve(2000)
    store.values = store.keys
    store.add(normal(2000, 8), normal(2000, 8))
    store.read(normal(64, 8, seed=4), "topk", k=5)
    optimizer = RowAdam([store.keys], lr=30.0)
    store.read(normal(1, 8), "topk", k=4).values.square().sum().backward()
    optimizer.step()
    moved = store.keys.detach()[store.keys.grad._indices()[0]]
    assert torch.equal(store.read(moved, "topk", k=1).ids, store.read(moved, k=1).ids)
    store.update([9], values=20 * torch.ones(1, 8))
    assert store.read(torch.ones(1, 8), "topk", k=1).ids.tolist() == store.read(torch.ones(1, 8), k=1).ids.tolist()


def test_an_index_follows_an_optimizer_that_moves_shared_keys() -> None:
    a, b = (SoftKVStore(8, 2, trainable=True, sparse_grad=True, index="IVF16,Flat") for _ in "ab")
    for store in (a, b):
        store.add(normal(2000, 8), normal(2000, 2, seed=1))
    b.keys = a.keys
    queries = normal(64, 8, seed=4)
    optimizer = torch.optim.AdamW([a.keys], lr=1.0, fused=True)  # torch does not count its writes
    for store in (a, b):
        for each in (a, b):
            assert each.audit(queries, k=5).mean_recall > 0.9
        optimizer.zero_grad()
        store.read(queries).values.sum().backward()
        optimizer.step()
    for each in (a, b):
        assert each.audit(queries, k=5).mean_recall > 0.9


def test_assigned_keys_become_the_stores_own() -> None:
    store = SoftKVStore(8, 2, trainable=True, sparse_grad=True, index="IVF16,Flat")
    store.add(normal(2000, 8), normal(2000, 2, seed=1))
    store.read(normal(64, 8), "topk", k=5)
    store.keys = nn.Parameter(normal(2000, 8, seed=2))
    assert store.audit(normal(64, 8), k=5).mean_recall > 0.9
    store.delete([0])
    with pytest.raises(softdb.ShapeError, match=r"keys: expected shape \(2000, 8\)"):
        store.keys = nn.Parameter(normal(1000, 8))
    with pytest.raises(TypeError, match="cannot assign"):
        store.keys = normal(2000, 8)
    assert store.audit(normal(64, 8), k=5).mean_recall > 0.9
    store._check()


class Normalized(nn.Module):
    def forward(self, keys: Tensor) -> Tensor:
        return nn.functional.normalize(keys, dim=-1)


def test_tables_cannot_be_parametrized_and_stay_as_they_are() -> None:
    store = make()
    before = rows_of(store)
    for name in ("keys", "values"):
        with pytest.raises(softdb.ArgumentError, match=rf"{name}: expected no deletion.*functional_call"):
            parametrize.register_parametrization(store, name, Normalized())
    for id, row in rows_of(store).items():
        assert torch.equal(row[0], before[id][0])
    add(store, 1)
    store._check()
    # functional_call with the normalized keys does the same.
    replacements = {"keys": Normalized()(store.keys)}
    torch.func.functional_call(store, replacements, (normal(3, 4),), {"mode": "topk", "k": 2}).square().sum().backward()
    assert store.keys.grad is not None


def test_pruned_values_are_read_and_not_written() -> None:
    store = make(capacity=None)
    prune.l1_unstructured(store, "values", amount=0.5)
    pruned = store.values.detach().clone()
    assert int((pruned[:6] == 0).sum()) > 0
    torch.testing.assert_close(store(normal(3, 4)), torch.softmax(normal(3, 4) @ store.keys[:6].T / 2, -1) @ pruned[:6])
    store(normal(3, 4), mode="topk", k=3).sum().backward()
    with pytest.raises(ForeignWriteError, match="pruning"):
        add(store, 1)
    prune.remove(store, "values")
    assert torch.equal(store.values, pruned)
    add(store, 1)
    store._check()


@pytest.mark.parametrize("trainable", [True, False])
def test_conversions_that_swap_tensors(trainable: bool) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = nn.Sequential(nn.Linear(4, 4), make(trainable=trainable))
        store = model[1]
        model(normal(2, 4)).sum().backward()
        model.zero_grad()
        model.double()
        assert store.keys.dtype == torch.float64
        assert store.rows.ids.dtype == torch.int64
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        store.read(normal(2, 4).double(), "topk", k=2).values.sum().backward() if trainable else None
        optimizer.step()
        assert store.audit(normal(2, 4).double(), k=2).mean_recall == 1.0
        store._check()
        model.float()
        add(store, 2)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_pruned_rows_are_computed_again_for_each_read() -> None:
    layer = MemoryLayer(8, 20, heads=2, key_dim=4, sparse_grad=False)
    x = normal(5, 8)
    prune.random_unstructured(layer.store, "values", amount=0.3)
    optimizer = torch.optim.SGD([layer.store.values_orig], lr=10.0)
    for _ in range(2):
        before = layer(x)
        before.square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, layer(x))
    layer.double()
    prune.remove(layer.store, "values")
    layer.store.update([0], keys=torch.zeros(1, 4, dtype=torch.float64))


def test_states_load_while_tensors_are_swapped() -> None:
    store = make()
    state = copy.deepcopy(store.state_dict())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        store.delete([2])
        store.load_state_dict(state)
        assert len(store) == 6
        store(normal(2, 4)).sum().backward()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    store._check()


def test_a_state_that_is_refused_leaves_the_store_as_it_was() -> None:
    store = make()
    state = copy.deepcopy(store.state_dict())
    for name in ("keys", "values", "rows.ids"):
        with pytest.raises(softdb.DtypeError, match=rf"state_dict\['{name}'\]: expected a dense tensor"):
            store.load_state_dict(state | {name: state[name].to_sparse()})
        assert len(store) == 6
    a, b = make(6, capacity=None), make(6, capacity=None, seed=3)
    state = copy.deepcopy(b.state_dict())
    b.keys = a.keys
    add(a, 30)
    with pytest.raises(ForeignWriteError, match=r"keys: expected shape \(6, 4\)"):
        b.load_state_dict(state)
    b.keys = nn.Parameter(torch.zeros(6, 4))
    b.load_state_dict(state)
    b._check()


def test_stores_that_are_assigned_one_state_keep_ids_of_their_own() -> None:
    state = copy.deepcopy(make().state_dict())
    one, other = make(0), make(0)
    for store in (one, other):
        store.load_state_dict(state, assign=True)
    one.delete([2])
    assert len(other) == 6
    assert 2 in other
    state["keys"] = state["keys"][:1].expand(20, 4)
    one.load_state_dict(state, assign=True)
    one.update([0], keys=torch.ones(1, 4))
    assert not torch.equal(one.get([0]).keys, one.get([5]).keys)


def test_growth_waits_for_reads_whose_saved_tensors_are_replaced() -> None:
    store = make(6, capacity=None)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        read = store.read(normal(2, 4))
    with pytest.raises(softdb.GrowthError, match="backward of a read is still due"):
        add(store, 30)
    read.values.sum().backward()
    add(store, 30)


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.trace")
def test_traces_and_stores_without_rows_are_refused() -> None:
    with pytest.raises(softdb.TransformError, match=r"query: expected no torch\.jit\.trace"):
        torch.jit.trace(make(), normal(2, 4))
    base = make().to("meta")
    replacements = {name: parameter.detach() for name, parameter in make().named_parameters()}
    with pytest.raises(softdb.DeviceError, match="to_empty"):
        torch.func.functional_call(base, replacements, (normal(2, 4),))


# -- copies and processes --------------------------------------------------------------------------------


def test_pickled_and_saved_modules_are_whole(tmp_path: Path) -> None:
    model = Model(make(8))
    model(normal(3, 4))
    model.store.delete([2])
    torch.save(model.store, tmp_path / "store.pt")
    for copied in (
        pickle.loads(pickle.dumps(model.store)),
        copy.deepcopy(model.store),
        torch.load(tmp_path / "store.pt", weights_only=False),
    ):
        assert_same_rows(copied, model.store)
        copied._check()
        assert add(copied, 1).tolist() == [8]
    assert len(model.store) == 7
    other = make(0)
    buffer = io.BytesIO()
    torch.save(model.store.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_rows(other, model.store)


class Lookups(torch.utils.data.Dataset[Tensor]):
    """Reads a store in a worker."""

    def __init__(self, store: SoftKVStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> Tensor:
        return self.store(normal(4, seed=place)).detach()


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_a_store(context: str) -> None:
    store = make(trainable=False)
    store(normal(2, 4))
    loader = torch.utils.data.DataLoader(
        Lookups(store), batch_size=2, num_workers=1, multiprocessing_context=context, timeout=120
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork with threads
        found = torch.cat(list(loader))
    torch.testing.assert_close(found, torch.stack([store(normal(4, seed=place)) for place in range(6)]))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_data_loader_resumes_among_reads_of_a_store() -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    store = make(trainable=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loader = loaders.StatefulDataLoader(
            Lookups(store), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=120
        )
        batches = iter(loader)
        first, state = next(batches), loader.state_dict()
        rest = list(batches)
        resumed = loaders.StatefulDataLoader(
            Lookups(store), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=120
        )
        resumed.load_state_dict(state)
        again = list(resumed)
    assert len(rest) == 2
    assert all(map(torch.equal, rest, again))
    torch.testing.assert_close(first, torch.stack([store(normal(4, seed=place)) for place in range(2)]))


# -- several processes -----------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("sparse", [True, False])
def test_ddp_with_one_process(sparse: bool, tmp_path: Path) -> None:
    store = make(12, sparse_grad=sparse)
    alone, query = copy.deepcopy(store), normal(3, 4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(store)
        for how in ({"mode": "exact"}, {"mode": "topk", "k": 3}):
            for read, each in ((wrapped, store), (alone, alone)):
                each.zero_grad()
                read(query, **how).square().sum().backward()
            for mine, other in zip(store.parameters(), alone.parameters(), strict=True):
                assert mine.grad is not None
                assert other.grad is not None
                assert mine.grad.is_sparse == sparse
                torch.testing.assert_close(mine.grad.to_dense(), other.grad.to_dense())
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of two processes says of each scenario of `ranks`."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    said = run_ranks(Path(ranks.__file__), tmp_path_factory.mktemp("ranks") / "meeting")
    return [dict(json.loads(line) for line in out.splitlines()) for out in said]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "default_ddp_leaves_each_process_its_rows",
        "ddp_begins_with_the_rows_of_rank_0",
        "ddp_reduces_row_sparse_gradients_without_visible_embeddings",
        "default_ddp_leaves_each_process_its_counters",
        "an_index_follows_rows_that_only_other_ranks_read",
        "row_optimizers_refuse_shards",
        "two_processes_equal_one_on_the_joint_batch",
        "zero_redundancy_optimizer",
        "fsdp2_with_dense_gradients",
        "fsdp2_of_layers",
        "fsdp2_refuses_sparse_gradients",
        "fsdp2_leaves_ignored_parameters_alone",
        "checkpoints_load_in_place",
    ],
)
def test_in_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    if name.startswith("fsdp2") and TORCH_RELEASE < (2, 7):
        pytest.skip("fully_shard needs a GPU in torch 2.6")
    for outcome in outcomes:
        assert outcome[name] == "passed", outcome[name]


# -- the tables ------------------------------------------------------------------------------------------


def test_each_line_of_the_tables_names_tests_that_exist() -> None:
    tests = Path(__file__).parents[1]
    page = (tests.parent / "docs" / "frameworks.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in tests.rglob("*.py"))
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.endswith("| tests |")]
    assert len(lines) > 40
    for line in lines:
        names = re.findall(r"`(\w+)`", line.split(" | ")[-1])
        assert names, line
        for name in names:
            assert f"def {name}(" in sources, name
