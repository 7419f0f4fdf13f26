"""Properties that do not apply raise AttributeErrors with specific messages."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import softdb
from softdb import SoftKVStore, functional, optim
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory

pytestmark = pytest.mark.each_device


def store_of_rows(**options: Any) -> SoftKVStore:
    store = SoftKVStore(4, 2, **options)
    store.add(torch.eye(4), torch.ones(4, 2))
    return store


def optimizer(kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return kind(store_of_rows(trainable=True).parameters())


# An object of every public class; errors are made of a message.
MADE: dict[str, Callable[[], object]] = {
    "SoftKVStore": store_of_rows,
    "SoftKVStore, trainable": lambda: store_of_rows(trainable=True),
    "SoftKVStore, empty": lambda: SoftKVStore(4, 2),
    "SoftKVStore, tracked": lambda: store_of_rows(track_usage=True, capacity=4, evict="lru"),
    "SoftKVStore, on meta": lambda: SoftKVStore(4, 2, device="meta"),
    "SoftKVStore, moved to meta": lambda: store_of_rows(track_usage=True).to("meta"),
    "Audit": lambda: store_of_rows().audit(torch.eye(4), 2),
    "Rows": lambda: store_of_rows().get([1]),
    "Usage": lambda: store_of_rows(track_usage=True).usage,
    "Read": lambda: store_of_rows().read(torch.eye(4)),
    "IndexConfig": softdb.IndexConfig,
    "IndexStats": lambda: store_of_rows().index_stats(),
    "MemoryLayer": lambda: MemoryLayer(4, 5),
    "MemoryLayer, a store a head": lambda: MemoryLayer(4, 5, shared=False),
    "ContextMemory": lambda: ContextMemory(4, 5),
    "ContextMemory, k": lambda: ContextMemory(4, 5, k=2),
    "ProductKeyMemory": lambda: ProductKeyMemory(4, 16, k=2),
    "ValueTable": lambda: ProductKeyMemory(4, 16, k=2).store,
    "RowAdam": lambda: optimizer(optim.RowAdam),
    "RowAdagrad": lambda: optimizer(optim.RowAdagrad),
    **{
        name: lambda name=name: getattr(softdb.errors, name)("text")  # type: ignore[misc]
        for name in softdb.errors.__all__
    },
}


def test_every_public_class_is_tested() -> None:
    public = {
        name
        for module in (softdb, functional, softdb.layers, optim)
        for name in module.__all__
        if isinstance(getattr(module, name), type)
    }
    assert public <= {name.partition(",")[0] for name in MADE}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_members_of_an_object_can_be_listed(make: Callable[[], object]) -> None:
    thing = make()
    assert inspect.getmembers(thing)
    assert inspect.getmembers(type(thing))
    for name in dir(thing):
        hasattr(thing, name)


def test_a_store_that_does_not_count_has_no_usage() -> None:
    store = store_of_rows()
    assert not hasattr(store, "usage")
    assert getattr(store, "usage", None) is None
    assert hasattr(store_of_rows(track_usage=True), "usage")
    with pytest.raises(softdb.NotApplicableError, match="make the store with track_usage=True"):
        _ = store.usage
    with pytest.raises(softdb.ArgumentError, match="track_usage: expected True"):
        _ = copy.deepcopy(store).usage
    with pytest.raises(AttributeError, match="'SoftKVStore' object has no attribute 'other'"):
        _ = store.other


def test_a_layer_that_does_not_count_has_no_usage() -> None:
    table = ProductKeyMemory(4, 16, k=2).store
    assert not hasattr(table, "usage")
    with pytest.raises(softdb.NotApplicableError, match="make the layer with track_usage=True"):
        _ = table.usage
    assert hasattr(ProductKeyMemory(4, 16, k=2, track_usage=True).store, "usage")
    for layer in (MemoryLayer(4, 5, shared=False), ProductKeyMemory(4, 16, k=2)):
        assert not hasattr(layer, "usage")


def test_a_layer_with_a_store_for_each_head_has_no_store() -> None:
    layer = MemoryLayer(4, 5, shared=False)
    assert not hasattr(layer, "store")
    assert hasattr(MemoryLayer(4, 5), "store")
    with pytest.raises(
        softdb.NotApplicableError,
        match=r"store: expected one store that all heads share, got 4 stores; use layer.stores",
    ):
        _ = layer.store
    with pytest.raises(AttributeError, match="has no attribute 'rows'"):
        _ = layer.rows
