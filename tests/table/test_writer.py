"""Test `softdb.table.writer`: rows that are deleted by a filter, and stores that are cleared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softdb
from softdb import ArgumentError, FieldError, SoftKVStore, StaleReadError, UnknownIdError

pytestmark = pytest.mark.each_device


def store_of(rows: int = 6, **options: Any) -> SoftKVStore:
    """Make a store with random rows whose field ``time`` is ten times the id."""
    store = SoftKVStore(3, 2, fields=("time",), **options)
    generator = torch.Generator().manual_seed(rows)
    keys, values = torch.randn(rows, 3, generator=generator), torch.randn(rows, 2, generator=generator)
    store.add(keys, values, fields={"time": 10 * torch.arange(rows)})
    return store


@pytest.mark.parametrize(
    ("where", "removed"),
    [
        (lambda row: row["time"] >= 30, {3, 4, 5}),
        (lambda row: (row["id"] == 0)[None], {0}),
        (lambda row: torch.tensor(True), {0, 2, 3, 4, 5}),
        (lambda row: row["id"] < 0, set()),
        (torch.tensor([True, False, True, False, False]), {0, 3}),
        ([False, False, False, False, True], {5}),
        (np.array([True, False, False, False, False]), {0}),
        (torch.tensor([4, 0]), {0, 4}),
        ([4, 4], {4}),
        (np.array([5, 3], dtype=np.int32), {3, 5}),
        ([], set()),
    ],
)
@pytest.mark.parametrize("index", ["Flat", "IVF1,Flat"])
def test_delete_removes_the_rows_that_a_filter_allows(where: Any, removed: set[int], index: str) -> None:
    store = store_of(index=index)
    store.delete(1)  # A mask has the order of store.ids.
    store.read(torch.ones(1, 3), "topk", k=2)
    assert store.read(torch.ones(1, 3), k=5, where=where).ids[0].sort().values[5 - len(removed) :].tolist() == sorted(
        removed
    )
    store.delete(where=where)
    left = {0, 2, 3, 4, 5} - removed
    assert set(store.ids.tolist()) == left
    assert set(store.read(torch.ones(1, 3), "topk", k=6).ids[0].tolist()) - {-1} == left
    store._check()


def test_a_rule_that_fails_deletes_nothing() -> None:
    store = store_of()
    with pytest.raises(FieldError, match=r"where: .* got 'size'"):
        store.delete(where=lambda row: row["size"] > 0)
    with pytest.raises(ZeroDivisionError):
        store.delete(where=lambda row: row["id"] > 1 / 0)
    assert len(store) == 6


def test_a_rule_that_deletes_rows_itself_raises_and_removes_no_other_row() -> None:
    store = store_of()

    def where(row: Any) -> Tensor:
        store.delete(0)
        return row["id"] < 2

    with pytest.raises(UnknownIdError, match="got unknown 0"):
        store.delete(where=where)
    assert store.ids.tolist() == [1, 2, 3, 4, 5]
    store._check()


@pytest.mark.parametrize("call", [lambda store: store.delete(), lambda store: store.delete(1, where=[1])])
def test_delete_takes_either_ids_or_a_filter(call: Callable[[SoftKVStore], None]) -> None:
    store = store_of()
    with pytest.raises(ArgumentError, match=r"ids, where: expected one of them, got (both|neither); .* clear\(\)"):
        call(store)
    assert len(store) == 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"index": "IVF1,Flat"},
        {"trainable": True},
        {"capacity": 6, "evict": "lru", "track_usage": True},
        {"capacity": 6, "evict": "oldest"},
    ],
)
def test_clear_equals_the_deletion_of_all_ids(options: dict[str, Any]) -> None:
    cleared, deleted = store_of(**options), store_of(**options)
    for store in (cleared, deleted):
        store.delete(3)
        store.read(torch.ones(2, 3), "topk", k=3).values.sum().backward() if store.trainable else None
    cleared.clear()
    deleted.delete(deleted.ids.flip(0))
    for _ in range(2):  # empty, then with rows that reuse the slots
        for name, tensor in deleted.state_dict().items():
            assert torch.equal(cleared.state_dict()[name], tensor), name
        assert torch.equal(cleared.rows.free.all(), deleted.rows.free.all())
        assert cleared.rows.id_hash == deleted.rows.id_hash
        for name in ("keys", "values"):
            gradient = getattr(cleared, name).grad
            assert gradient is None or not gradient.to_dense().any()
        for store in (cleared, deleted):
            store._check()
            assert store.add(torch.ones(2, 3), torch.ones(2, 2), fields={"time": 0})[0] == store.rows.first_new_id - 2
    assert cleared.ids.tolist() == [6, 7, 8, 9]
    assert torch.equal(cleared(torch.ones(1, 3)), torch.ones(1, 2))


def test_an_empty_store_can_be_cleared() -> None:
    store = SoftKVStore(3, 2)
    version = store.rows.version
    store.clear()
    assert len(store) == 0
    assert store.rows.version == version


def test_clear_makes_open_reads_of_trained_rows_stale() -> None:
    store = store_of(trainable=True)
    output = store(torch.ones(2, 3)).sum()
    store.clear()
    with pytest.raises(StaleReadError):
        output.backward()


def test_writes_take_ids_in_lists_and_arrays() -> None:
    store = store_of(0)
    keys, values = torch.ones(2, 3), torch.ones(2, 2)
    store.add(keys, values, ids=np.array([7, 5])[::-1], fields={"time": np.array([1, 2])[::-1]})
    assert store.ids.tolist() == [5, 7]
    assert store.fields_at([5, 7], "time").tolist() == [2, 1]
    store.put((7, 9), keys, values, fields={"time": 3})
    store.update(np.array([9], dtype=np.int32), fields={"time": [4]})
    store.touch([[5]][0])
    store.revive([np.int64(5), np.int64(7)], 2 * keys, values)
    frozen = np.array([7, 5])
    frozen.flags.writeable = False
    store.delete(frozen)
    store.delete(np.int64(9))
    assert len(store) == 0


@pytest.mark.cpu_only
def test_device_and_dtype_are_those_of_the_tensors() -> None:
    store = SoftKVStore(3, 2, dtype=torch.float64)
    assert store.dtype == torch.float64
    assert store.to(torch.bfloat16).dtype == torch.bfloat16
    assert store.device == torch.device("cpu")
    assert softdb.SoftKVStore(3, 2, device="meta").device.type == "meta"
