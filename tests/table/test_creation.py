"""Test `SoftKVStore.from_tensors`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.tolerances import allclose

import softdb
from softdb import (
    ArgumentError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    FieldError,
    NonFiniteError,
    ShapeError,
    SoftKVStore,
)

pytestmark = pytest.mark.each_device


def tensors(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, 2, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ids": [9, 3, 5, 7, 2]},
        {"ids": np.arange(5)[::-1], "fields": {"time": [1, 2, 3, 4, 5], "user": 7}},
        {"trainable": True, "metric": "l2", "temperature": 0.5, "sparse_grad": False, "index": "Flat"},
        {"capacity": 8, "evict": "lru", "track_usage": True, "fields": {"time": torch.arange(5)}},
    ],
)
def test_a_store_from_tensors_equals_one_that_rows_are_added_to(options: dict[str, Any]) -> None:
    keys, values = tensors()
    store = SoftKVStore.from_tensors(keys, values, **options)
    rest = dict(options)
    ids, fields = rest.pop("ids", None), rest.pop("fields", None)
    wanted = SoftKVStore(3, 2, fields=tuple(fields or ()), **rest)
    wanted.add(keys, values, ids, fields)
    assert repr(store) == repr(wanted)
    state = store.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert len(store.keys) == options.get("capacity", 5)  # no slot is left over
    store._check()


@pytest.mark.parametrize(
    ("key_dtype", "value_dtype", "wanted"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_the_dtype_loses_nothing(key_dtype: torch.dtype, value_dtype: torch.dtype, wanted: torch.dtype) -> None:
    keys, values = tensors()
    store = SoftKVStore.from_tensors(keys.to(key_dtype), values.to(value_dtype))
    assert store.dtype == wanted
    assert torch.equal(store.get(store.ids).values, values.to(value_dtype).to(wanted))


def test_the_store_keeps_copies_without_a_graph() -> None:
    keys, values = (tensor.requires_grad_() for tensor in tensors())
    store = SoftKVStore.from_tensors(keys * 1, values)
    with torch.no_grad():
        values.zero_()
    assert store.get(0).values.all()
    assert not store(torch.ones(1, 3)).requires_grad


def test_a_subclass_and_an_empty_table() -> None:
    class Cache(SoftKVStore):
        pass

    store = Cache.from_tensors(torch.empty(0, 3), torch.empty(0, 2), fields={"time": []})
    assert type(store) is Cache
    assert (len(store), store.fields, store.key_dim, store.value_dim) == (0, ("time",), 3, 2)
    assert store.add(*tensors(), fields={"time": 1}).tolist() == [0, 1, 2, 3, 4]


def test_a_store_may_be_created_within_a_transform() -> None:
    keys, values = tensors()
    found = torch.func.grad(lambda query: SoftKVStore.from_tensors(keys, values)(query).sum())(torch.ones(3))
    query = torch.ones(3, requires_grad=True)
    (wanted,) = torch.autograd.grad(SoftKVStore.from_tensors(keys, values)(query).sum(), query)
    assert allclose(found, wanted)


KEYS, VALUES = tensors()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": KEYS.numpy()}, DtypeError, "keys: expected a floating-point torch.Tensor, got a ndarray"),
        ({"keys": KEYS[0]}, ShapeError, r"keys: expected shape \(any, any\), got \(3,\)"),
        ({"keys": KEYS[:, :0]}, ShapeError, r"keys: expected a width of at least 1, got shape \(5, 0\)"),
        ({"keys": KEYS.to("meta"), "values": VALUES.to("meta")}, DeviceError, "keys: expected a tensor with data"),
        ({"values": VALUES.to("meta")}, DeviceError, "values: expected a tensor on cpu, got one on meta"),
        ({"values": VALUES[:4]}, ShapeError, "values: expected 5 rows, one for each key, got 4"),
        ({"values": VALUES.long()}, DtypeError, r"values: .* got torch.int64; .* or store integers in fields=\.\.\."),
        ({"values": VALUES * torch.nan}, NonFiniteError, "values: expected finite numbers"),
        ({"ids": [0, 1, 2, 3, 3]}, DuplicateIdError, "ids: expected each id once, got repeated ids 3"),
        ({"ids": 4}, ShapeError, "ids: expected a 1-dimensional list of ids"),
        ({"fields": ["time"]}, DtypeError, "fields: expected a mapping from field name to int64 tensor, got list"),
        ({"fields": {"id": 4}}, FieldError, "fields: expected names other than 'id'"),
        ({"fields": {"time": [1]}}, ShapeError, r"fields\['time'\]: expected one number or shape \(5,\)"),
        ({"capacity": 4}, ArgumentError, "keys: expected at most 4 rows, the store's capacity, got 5"),
        ({"key_dim": 3}, ArgumentError, "key_dim: expected no value, since from_tensors takes it from keys; leave"),
        ({"value_dim": 2}, ArgumentError, "value_dim: expected no value, since from_tensors takes it from values"),
        ({"dtype": torch.float32}, ArgumentError, "dtype: expected no value, since from_tensors takes it from"),
        ({"device": "cpu"}, ArgumentError, "device: expected no value, since from_tensors takes it from keys"),
        ({"metrics": "l2"}, DtypeError, r"metrics: SoftKVStore has no such argument; did you mean metric=\.\.\.\?"),
        ({"metric": "l1"}, ArgumentError, "metric: expected one of"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[softdb.SoftDBError], message: str) -> None:
    with pytest.raises(error, match=message):
        SoftKVStore.from_tensors(**({"keys": KEYS, "values": VALUES} | change))
