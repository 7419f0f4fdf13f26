"""Stores and layers on the meta device, where they can be created, moved and initialized."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import softdb
from softdb import SoftKVStore
from softdb.functional import soft_read
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory

OPTIONS: list[dict[str, Any]] = [{}, {"trainable": True}, {"capacity": 8, "evict": "lru"}]
HOW_TO_GO_ON = r"call store.to_empty\(device=...\) and then .*load_state_dict\(..., assign=True\)"


def filled(**options: Any) -> SoftKVStore:
    store = SoftKVStore(4, 2, fields=("time",), track_usage=True, **options)
    store.add(torch.randn(6, 4), torch.randn(6, 2), fields={"time": 0})
    store.delete([2])
    return store


@pytest.fixture(params=[*((made, o) for made in ("made", "moved") for o in OPTIONS)], ids=str)
def store(request: pytest.FixtureRequest) -> SoftKVStore:
    """Return a store on the meta device, created there or moved there."""
    made, options = request.param
    if made == "moved":
        return filled(**options).to("meta")
    return SoftKVStore(4, 2, fields=("time",), track_usage=True, device="meta", **options)


KEYS, VALUES = torch.empty(2, 4, device="meta"), torch.empty(2, 2, device="meta")
OPERATIONS: dict[str, Callable[[SoftKVStore], object]] = {
    "call": lambda store: store(KEYS),
    "exact": lambda store: store.read(KEYS),
    "exact, k": lambda store: store.read(KEYS, k=1),
    "sparsemax": lambda store: store.read(KEYS, normalizer="sparsemax"),
    "gumbel": lambda store: store.read(KEYS, normalizer="gumbel"),
    "topk": lambda store: store.read(KEYS, "topk", k=1),
    "tail": lambda store: store.read(KEYS, "topk", k=1, tail_samples=4),
    "tolerance": lambda store: store.read(KEYS, "topk", tolerance=0.1),
    "hard": lambda store: store.read(KEYS, "hard"),
    "where": lambda store: store.read(KEYS, where=torch.tensor([0])),
    "exclude": lambda store: store.read(KEYS, exclude=torch.tensor([[0], [1]])),
    "query on the CPU": lambda store: store.read(torch.randn(2, 4)),
    "autocast": lambda store: _in_autocast(lambda: store.read(KEYS)),
    "compiled": lambda store: torch.compile(store, backend="eager")(KEYS),
    "add": lambda store: store.add(KEYS, VALUES, fields={"time": 0}),
    "add from the CPU": lambda store: store.add(torch.ones(2, 4), torch.ones(2, 2), fields={"time": 0}),
    "put": lambda store: store.put([0, 1], KEYS, VALUES, fields={"time": 0}),
    "update": lambda store: store.update([0, 1], keys=KEYS),
    "update a field": lambda store: store.update([0, 1], fields={"time": 1}),
    "revive": lambda store: store.revive([0, 1], KEYS, VALUES),
    "delete": lambda store: store.delete([0]),
    "get": lambda store: store.get([0]),
    "save": lambda store: store.save("nowhere"),
    "build_index": lambda store: store.build_index(),
    "refresh": lambda store: store.refresh(),
    "audit": lambda store: store.audit(KEYS, 2),
    "touch": lambda store: store.touch([0]),
    "index_stats": lambda store: store.index_stats(),
    "load_state_dict": lambda store: store.load_state_dict(filled(capacity=store.capacity).state_dict(), strict=False),
}


def _in_autocast(action: Callable[[], object]) -> object:
    with torch.autocast("cpu"):
        return action()


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_that_need_data_say_how_to_initialize(
    store: SoftKVStore, operation: Callable[[SoftKVStore], Any]
) -> None:
    count = len(store)
    with pytest.raises(softdb.DeviceError, match=HOW_TO_GO_ON):
        operation(store)
    assert len(store) == count


def test_a_store_on_meta_is_a_module_like_any_other(store: SoftKVStore) -> None:
    assert "key_dim=4" in repr(store)
    assert store.ids.shape == store.usage.reads.shape == (len(store),)
    state = store.state_dict()
    assert state["keys"].is_meta
    for twin in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)), store.half().float()):
        assert twin.state_dict().keys() == state.keys()
        assert twin.keys.is_meta
    if store.capacity is None:
        store.reserve(9)
        assert store.keys.shape == (9, 4)
    with store.writing():
        pass
    store.to_empty(device="cpu")
    assert len(store) == 0
    store.add(torch.eye(4)[:2], torch.ones(2, 2), fields={"time": 0})
    store._check()
    assert store(torch.ones(4)).tolist() == [1.0, 1.0]


def test_a_state_is_assigned_to_a_store_on_meta(store: SoftKVStore) -> None:
    options = {"trainable": store.trainable, "capacity": store.capacity, "evict": store.evict}
    saved = filled(**options)
    with pytest.raises(softdb.DeviceError, match=r"state_dict.*: expected a tensor with data, got one on the meta"):
        filled(**options).load_state_dict(copy.deepcopy(saved).to("meta").state_dict(), assign=True)
    store.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    store._check()
    assert store.ids.tolist() == [0, 1, 3, 4, 5]
    query = torch.randn(3, 4)
    assert torch.equal(store(query), saved(query))


# -- layers ----------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "memory": lambda **made: MemoryLayer(8, 6, heads=2, key_dim=4, **made),
    "memory, top-k": lambda **made: MemoryLayer(8, 6, heads=2, key_dim=4, mode="topk", k=2, shared=False, **made),
    "context": lambda **made: ContextMemory(8, 6, heads=2, key_dim=4, **made),
    "context, top-k": lambda **made: ContextMemory(8, 6, heads=2, key_dim=4, k=2, **made),
    "product": lambda **made: ProductKeyMemory(8, 16, heads=2, key_dim=4, k=2, **made),
}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_errors_of_a_layer_on_meta_say_how_to_initialize(make: Callable[..., nn.Module], moved: bool) -> None:
    if moved:
        layer = make()
        layer(torch.randn(2, 3, 8))
        layer.to("meta")
    else:
        layer = make(device="meta")
    for x in (torch.empty(2, 3, 8, device="meta"), torch.randn(2, 3, 8)):
        for call in (layer, torch.compile(layer, backend="eager")):
            with pytest.raises(softdb.DeviceError, match=r"layer.to_empty\(device=...\) and then reset_parameters\(\)"):
                call(x)
    assert repr(layer)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.to_empty(device="cpu")
    layer.reset_parameters()  # type: ignore[operator]
    assert layer(torch.randn(2, 3, 8)).isfinite().all()


def test_layers_on_meta_share_a_store() -> None:
    with torch.device("meta"):
        first = MemoryLayer(8, 6, key_dim=4)
        model = nn.ModuleList([first, MemoryLayer(8, 6, key_dim=4, store=first.store)])
        with pytest.raises(softdb.ShapeError, match=r"store: expected 7 rows .* got 6"):
            MemoryLayer(8, 7, key_dim=4, store=first.store)
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()  # type: ignore[operator]
        assert layer(torch.randn(3, 8)).isfinite().all()


def test_to_empty_of_a_store_in_memory_forgets_its_rows() -> None:
    for rows in (0, 6):
        store = softdb.SoftKVStore(4, 3, capacity=8, trainable=True)
        store.add(torch.randn(rows, 4), torch.randn(rows, 3))
        store.to_empty(device="cpu")
        if len(store):  # torch may give the same memory again
            assert len(store) == rows
        store._check()
        assert len(store.add(torch.randn(2, 4), torch.randn(2, 3))) == 2


def test_functions_of_tensors_on_meta_are_refused() -> None:
    with pytest.raises(softdb.DeviceError, match="query: expected a tensor with data, got one on the meta device"):
        soft_read(KEYS, KEYS, VALUES)


def test_saving_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(softdb.DeviceError):
        SoftKVStore(4, 2, device="meta").save(tmp_path / "store")
    assert not list(tmp_path.iterdir())
