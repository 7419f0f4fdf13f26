"""Writes of rows on each device: rows of the CPU, growth, eviction, filters and snapshots."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softdb import SoftKVStore
from softdb.errors import DeviceError, NonFiniteError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy in pinned memory, where there is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor.clone()


def check_rows(store: SoftKVStore, ids: Tensor, keys: Tensor, values: Tensor) -> None:
    rows = store.get(ids)
    assert torch.equal(rows.keys.cpu(), keys)
    assert torch.equal(rows.values.cpu(), values)


def test_a_store_takes_rows_of_the_cpu_and_their_memory_may_be_overwritten(device: torch.device) -> None:
    store = SoftKVStore(64, 32, device=device, fields=("time",))
    keys, values = normal(2_000, 64), normal(2_000, 32, seed=1)
    given = on_host(keys, device), on_host(values, device)
    ids = store.add(*given, fields={"time": torch.arange(2_000, device="cpu")})
    for tensor in given:
        tensor.zero_()
    assert ids.device.type == device.type
    check_rows(store, ids, keys, values)
    some, new = ids[5:50].cpu(), normal(45, 64, seed=2)
    store.update(some, keys=new)
    store.put(some[:10], new[10:20], values[:10], fields={"time": 3})
    check_rows(store, some, torch.cat([new[10:20], new[10:]]), torch.cat([values[:10], values[15:50]]))
    store.revive(some, new, values[:45])
    check_rows(store, some, new, values[:45])
    mixed = store.add(new.to(device), values[:45], fields={"time": 0})
    check_rows(store, mixed, new, values[:45])
    store._check()


def test_invalid_rows_of_the_cpu_change_nothing(device: torch.device) -> None:
    store = SoftKVStore(4, 2, device=device)
    store.add(normal(3, 4), normal(3, 2))
    keys = normal(2, 4)
    keys[1, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="keys: expected finite numbers"):
        store.add(keys, normal(2, 2))
    with pytest.raises(DeviceError, match="values: expected a tensor on"):
        store.add(normal(2, 4), normal(2, 2).to("meta"))
    assert len(store) == 3


@pytest.mark.gpu
def test_tensors_on_other_devices_are_refused() -> None:
    for place, other in (("cpu", "cuda"), ("cuda", "cpu")):
        store = SoftKVStore(4, 2, device=place)
        store.add(normal(3, 4).to(place), normal(3, 2).to(place))
        with pytest.raises(DeviceError, match=f"query: expected a tensor on {place}"):
            store.read(normal(1, 4).to(other))
    store = SoftKVStore(4, 2)
    with pytest.raises(DeviceError, match="keys: expected a tensor on cpu, got one on cuda"):
        store.add(normal(3, 4).to("cuda"), normal(3, 2).to("cuda"))


def compare(store: SoftKVStore, reference: SoftKVStore, seed: int, count: int = 6) -> None:
    """Compare ids, rows, fields and reads with ``count`` filters of a store with those of a store on the CPU."""
    assert torch.equal(store.ids.cpu(), reference.ids)
    mine, other = store.get(store.ids), reference.get(reference.ids)
    assert torch.equal(mine.keys.cpu(), other.keys)
    assert torch.equal(mine.values.cpu(), other.values)
    assert torch.equal(mine.fields["time"].cpu(), other.fields["time"])
    query = normal(6, 8, seed=seed)
    exclude = torch.randint(0, 300, (6, 5), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    mask = torch.rand(len(reference), generator=torch.Generator("cpu").manual_seed(seed), device="cpu") < 0.6
    filters: list[dict[str, Any]] = [
        {},
        {"exclude": exclude},
        {"where": mask},
        {"where": reference.ids[mask]},
        {"where": lambda row: row["time"] % 3 == 0},
        {"where": lambda row: row["time"] > torch.arange(6, device=row["time"].device)[:, None]},
    ]
    for how in filters[:count]:
        here = {name: value.to(store.device) if isinstance(value, Tensor) else value for name, value in how.items()}
        for mode in ("exact", "topk", "hard"):
            k = None if mode == "hard" else 4
            read, wanted = (
                store.read(query.to(store.device), mode, k=k, **here),
                reference.read(query, mode, k=k, **how),
            )
            assert read.ids is not None
            assert wanted.ids is not None
            assert torch.equal(read.ids.cpu(), wanted.ids), (mode, how)
            torch.testing.assert_close(read.values.cpu(), wanted.values, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(read.lse.cpu(), wanted.lse, atol=1e-5, rtol=1e-5)


def write(store: SoftKVStore, step: int) -> None:
    """Write rows: the same for each device."""
    device, seed = store.device, 10 * step
    ids = store.add(
        normal(30, 8, seed=seed).to(device),
        normal(30, 4, seed=seed + 1).to(device),
        fields={"time": torch.arange(30) + step},
    )
    store.delete(ids[::4])
    store.update(ids[1:3], values=normal(2, 4, seed=seed + 2).to(device), fields={"time": 7})
    store.put(
        torch.tensor([1000 + step, int(ids[5])]),
        normal(2, 8, seed=seed + 3).to(device),
        normal(2, 4, seed=seed + 4).to(device),
        fields={"time": [1, 2]},
    )
    if step == 2:
        store.delete(where=lambda row: row["time"] % 5 == 0)


@pytest.mark.parametrize(
    "options", [{}, {"capacity": 50, "evict": "lru", "track_usage": True}, {"capacity": 50, "evict": "oldest"}], ids=str
)
def test_writes_leave_the_same_rows_as_on_the_cpu(options: dict[str, Any], device: torch.device) -> None:
    stores = [SoftKVStore(8, 4, device=place, fields=("time",), index="Flat", **options) for place in (device, "cpu")]
    for step in range(4):
        for store in stores:
            write(store, step)
        compare(*stores, seed=step)
        for store in stores:
            store._check()
    if not options.get("capacity"):
        for store in stores:
            store.compact()
            store.reserve(500)
        compare(*stores, seed=9)
    if options.get("track_usage"):
        assert torch.equal(stores[0].usage.reads.cpu(), stores[1].usage.reads)


@pytest.mark.slow
def test_snapshots_copies_and_states_move_between_devices(device: torch.device, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "fields": ("time",),
        "index": "Flat",
        "capacity": 60,
        "evict": "lru",
        "track_usage": True,
    }
    store, reference = (SoftKVStore(8, 4, device=place, **options) for place in (device, "cpu"))
    for step in range(2):
        write(store, step)
        write(reference, step)
    compare(store, reference, seed=1)
    store.save(tmp_path / "rows")
    written = copy.deepcopy(reference)
    write(written, 5)
    loaded = SoftKVStore(8, 4, device=device, **options)
    loaded.load_state_dict(reference.state_dict())
    on_cpu = SoftKVStore(8, 4, **options)
    on_cpu.load_state_dict(store.state_dict())
    others = [
        SoftKVStore.load(tmp_path / "rows", device=device),
        SoftKVStore.load(tmp_path / "rows"),
        SoftKVStore.load(tmp_path / "rows", mmap=True).to(device),
        copy.deepcopy(store),
        copy.deepcopy(reference).to(device),
        pickle.loads(pickle.dumps(store)),
        loaded,
        on_cpu,
    ]
    for number, other in enumerate(others):
        if number != 2:  # a store of mapped rows is read-only until materialize()
            write(other, 5)
            compare(other, written, seed=3, count=1)
        else:
            compare(other, reference, seed=3, count=1)
