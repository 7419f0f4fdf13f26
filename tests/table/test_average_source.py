"""Averages of keys and values alone: copies that are averages, and copies that are not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from softdb import ForeignWriteError, SoftKVStore
from softdb.optim import RowAdam


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(rows: int = 6, *, value_dim: int = 3, **options: Any) -> SoftKVStore:
    store = SoftKVStore(4, value_dim, **{"trainable": True, "capacity": 20} | options)
    store.add(normal(rows, 4), normal(rows, value_dim, seed=1))
    return store


def replace_row(store: SoftKVStore, id: int = 2, seed: int = 7) -> None:
    store.delete([id])
    store.add(normal(1, 4, seed=seed), normal(1, store.value_dim, seed=seed + 1))


def update(average: SoftKVStore, store: SoftKVStore, rate: float) -> None:
    for mine, theirs in zip(average.parameters(), store.parameters(), strict=True):
        mine.detach().lerp_(theirs.detach(), rate)


def assert_mixed(average: SoftKVStore, *ids: int) -> None:
    with pytest.raises(ForeignWriteError, match=rf"ids {', '.join(map(str, ids))}\).*update_average"):
        list(average.parameters())


def test_each_listing_of_a_mixed_average_raises_until_rows_are_loaded() -> None:
    store = make()
    average = copy.deepcopy(store)
    replace_row(store)
    update(average, store, 0.3)
    for _ in range(2):
        assert_mixed(average, 6)
        with pytest.raises(ForeignWriteError):
            average.state_dict()
    average.load_state_dict(store.state_dict())
    assert len(list(average.parameters())) == 2
    replace_row(store, 3)
    update(average, store, 0.3)
    assert_mixed(average, 7)


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 0.02), (torch.float16, 0.01), (torch.float32, 1e-5)])
def test_small_steps_of_an_average_are_found(dtype: torch.dtype, rate: float) -> None:
    store = make(dtype=dtype)
    average = copy.deepcopy(store)
    replace_row(store)
    update(average, store, rate)
    assert_mixed(average, 6)


def test_an_average_of_values_alone_is_found() -> None:
    store = make()
    store.keys.requires_grad_(False)
    average = copy.deepcopy(store)
    replace_row(store)
    for mine, theirs in zip(average.parameters(), store.parameters(), strict=True):
        if mine.requires_grad:
            mine.detach().lerp_(theirs.detach(), 0.2)
    assert_mixed(average, 6)


def test_an_average_that_lists_parameters_in_the_middle_of_an_update_is_found() -> None:
    store = make()
    average = copy.deepcopy(store)
    replace_row(store)

    def update_by_name() -> None:
        for name, theirs in store.named_parameters():
            dict(average.named_parameters())[name].data.lerp_(theirs.data, 0.3)

    with pytest.raises(ForeignWriteError, match="update_average"):
        update_by_name()


def test_a_mix_is_recorded_where_warnings_are_errors() -> None:
    store = make()
    average = copy.deepcopy(store)
    update(average, store, 0.3)
    store.delete([2])
    store.add(normal(2, 4, seed=8), normal(2, 3, seed=9))  # one in the slot of row 2, one in an empty slot
    update(average, store, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_mixed(average, 6)
    with pytest.raises(ForeignWriteError):
        average.read(normal(1, 4))


def test_rows_in_slots_that_a_copy_left_empty_are_not_mixed() -> None:
    store = make()
    average = copy.deepcopy(store)
    store.delete([2, 4])
    update(average, store, 1.0)
    update(average, store, 0.3)
    store.add(normal(1, 4, seed=8), normal(1, 3, seed=9))
    update(average, store, 0.3)
    with pytest.warns(UserWarning, match="got 1 that started from zero"):
        list(average.parameters())


def test_an_average_that_grows_with_its_source_is_followed() -> None:
    store = make(capacity=None)
    average = copy.deepcopy(store)
    replace_row(store)
    store.reserve(40)
    average.reserve(40)
    update(average, store, 0.3)
    assert_mixed(average, 6)


def test_rows_that_are_equal_do_not_hide_one_that_is_mixed() -> None:
    store = make(100, capacity=100)
    average = copy.deepcopy(store)
    rows = store.get(range(99))
    store.delete(range(100))
    store.add(torch.cat([rows.keys, normal(1, 4, seed=8)]), torch.cat([rows.values, normal(1, 3, seed=9)]))
    update(average, store, 0.3)
    with pytest.raises(ForeignWriteError, match="update_average"):
        list(average.parameters())


def test_non_finite_numbers_do_not_hide_a_mix() -> None:
    store = make()
    average = copy.deepcopy(store)
    replace_row(store)
    replace_row(store, 3)
    with torch.no_grad():
        store.keys[2, 0] = torch.nan
    update(average, store, 0.3)
    with pytest.raises(ForeignWriteError, match="update_average"):
        list(average.parameters())


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW, RowAdam])
@pytest.mark.parametrize("value_dim", [1, 3])
def test_a_copy_that_an_optimizer_trains_is_no_average(build: Any, value_dim: int) -> None:
    store = make(value_dim=value_dim, metric="l2", sparse_grad=build is RowAdam)
    copied = copy.deepcopy(store)
    key, value = store.get([2]).keys, torch.full((1, value_dim), 5.0)
    store.delete([2])
    store.add(key, value)
    optimizer = build(copied.parameters(), lr=0.1)
    for _ in range(3):  # towards the row of the source
        optimizer.zero_grad()
        (copied.read(key, "topk", k=1).values - value).square().sum().backward()
        optimizer.step()
    assert len(list(copied.parameters())) == 2
    copied._check()


def test_a_copy_by_value_of_one_number_a_row_is_no_mix() -> None:
    store = make(value_dim=1)
    average = copy.deepcopy(store)
    replace_row(store)
    update(average, store, 1.0)
    for _ in range(3):
        with torch.no_grad():
            store.keys.add_(0.1)
            store.values.add_(0.1)
        update(average, store, 0.2)
    assert len(list(average.parameters())) == 2


def test_a_source_that_is_gone_is_not_looked_at() -> None:
    store = make()
    average = copy.deepcopy(store)
    read = store.read(normal(2, 4))  # keeps the table of the source alive
    replace_row(store)
    del store
    assert len(list(average.parameters())) == 2
    assert read.values.requires_grad


def test_copies_are_not_compared_while_they_are_traced() -> None:
    store = make(trainable=False)
    copied = copy.deepcopy(store)
    store.add(normal(1, 4), normal(1, 3))
    program = torch.export.export(copied.eval(), (normal(2, 4),), strict=False)
    torch.testing.assert_close(program.module()(normal(2, 4)), copied(normal(2, 4)))
    trained = make()
    other = copy.deepcopy(trained)
    replace_row(trained)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert len(dict(other.named_modules())) == 2


def test_an_idle_source_costs_no_copies() -> None:
    store = make()
    average = copy.deepcopy(store)
    watch = average.rows.average.source
    assert watch is not None
    replace_row(store)
    list(average.parameters())
    kept = watch._sample
    assert kept is not None
    list(average.parameters())
    assert watch._sample is not None
    assert watch._sample.version is kept.version
