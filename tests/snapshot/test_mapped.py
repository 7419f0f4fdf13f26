"""Stores whose rows are mapped files of a snapshot."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import check_exit

import softdb
from softdb import CorruptSnapshotError, ReadOnlyError, SoftKVStore
from softdb.optim import RowAdam


def saved(path: Path, rows: int = 50, **options: Any) -> SoftKVStore:
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(4, 3, **options)
    fields = {name: torch.arange(rows) for name in store.fields} or None
    keys, values = torch.randn(rows, 4, generator=generator), torch.randn(rows, 3, generator=generator)
    store.add(keys, values, fields=fields)
    store.delete([3, rows - 1])
    store.save(path)
    return store


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "trainable": {"trainable": True, "metric": "l2"},
    "fields": {"fields": ("time",), "index": "IVF4,Flat"},
    "lru": {"capacity": 80, "evict": "lru", "track_usage": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("how", [{"mode": "exact", "k": 3}, {"mode": "topk", "k": 3}, {"mode": "hard"}])
def test_a_mapped_store_answers_as_the_saved_one(options: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    store = saved(tmp_path, **options)
    mapped = SoftKVStore.load(tmp_path, mmap=True)
    query = torch.randn(6, 4, dtype=store.keys.dtype, requires_grad=True)
    exclude = torch.tensor([[5], [-1], [7], [7], [9], [1]])
    for more in ({}, {"exclude": exclude}, {"where": lambda row: row["id"] > 20}):
        wanted, found = (one.read(query, **how, **more) for one in (store, mapped))
        assert torch.equal(wanted.values, found.values)
        assert torch.equal(wanted.ids, found.ids)
        gradients = [torch.autograd.grad(read.values.sum(), query)[0] for read in (wanted, found)]
        assert torch.equal(*gradients)
    assert torch.equal(store.ids, mapped.ids)
    assert torch.equal(store.get([7, 8]).keys, mapped.get([7, 8]).keys)
    assert mapped.extra_repr() == store.extra_repr()


WRITES: dict[str, Callable[[SoftKVStore], object]] = {
    "add": lambda store: store.add(torch.ones(1, 4), torch.ones(1, 3)),
    "put": lambda store: store.put([7], torch.ones(1, 4), torch.ones(1, 3)),
    "update": lambda store: store.update([7], keys=torch.ones(1, 4)),
    "revive": lambda store: store.revive([7], torch.ones(1, 4), torch.ones(1, 3)),
    "delete": lambda store: store.delete(where=[7]),
    "clear": lambda store: store.clear(),
    "reserve": lambda store: store.reserve(100),
    "touch": lambda store: store.touch([7]),
    "load_state_dict": lambda store: store.load_state_dict(SoftKVStore(4, 3).state_dict()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_mapped_store_is_read_only_until_materialize(write: Callable[[SoftKVStore], object], tmp_path: Path) -> None:
    saved(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    store = SoftKVStore.load(tmp_path, mmap=True)
    with pytest.raises(ReadOnlyError, match=r"materialize\(\)"):
        write(store)
    keys, ids = store.keys.clone(), store.ids
    store.materialize()
    assert torch.equal(store.keys, keys)
    assert torch.equal(store.ids, ids)
    write(store)
    store.materialize()  # does nothing
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_trainable_mapped_store_trains_after_materialize(tmp_path: Path) -> None:
    saved(tmp_path, trainable=True)
    store = SoftKVStore.load(tmp_path, mmap=True)
    keys = store.keys
    assert not keys.requires_grad
    store.materialize()
    assert store.keys is keys
    assert keys.requires_grad
    optimizer = RowAdam(store.parameters(), lr=0.1)
    before = store.get([7]).keys
    store.read(before, "topk", k=2).values.sum().backward()
    optimizer.step()
    assert not torch.equal(store.get([7]).keys, before)
    other = SoftKVStore.load(tmp_path)
    assert torch.equal(other.get([7]).keys, before)


def test_writes_in_place_stay_in_memory(tmp_path: Path) -> None:
    store = saved(tmp_path)
    mapped = SoftKVStore.load(tmp_path, mmap=True)
    mapped.values.zero_()
    assert (mapped.read(torch.ones(1, 4)).values == 0).all()
    assert torch.equal(SoftKVStore.load(tmp_path).values[:10], store.values[:10])


def test_a_mapped_store_can_be_saved_over_its_own_snapshot(tmp_path: Path) -> None:
    store = saved(tmp_path, rows=2000)
    mapped = SoftKVStore.load(tmp_path, mmap=True)
    for _ in range(3):
        mapped.save(tmp_path)
    saved(tmp_path, rows=5)
    wanted = store.get(store.ids)
    assert torch.equal(mapped.get(store.ids).keys, wanted.keys)  # answers may differ by rounding: by where rows lie
    assert torch.equal(mapped.get(store.ids).values, wanted.values)
    mapped.materialize()
    mapped.save(tmp_path)
    loaded, query = SoftKVStore.load(tmp_path), torch.randn(3, 4)
    assert torch.equal(loaded.get(store.ids).keys, wanted.keys)
    torch.testing.assert_close(loaded.read(query).values, store.read(query).values)


def test_rows_are_compared_with_their_hashes_on_demand(tmp_path: Path) -> None:
    saved(tmp_path)
    (file,) = tmp_path.glob("values-*")
    flip(file, -1)
    SoftKVStore.load(tmp_path, mmap=True)
    for more in ({"mmap": True, "verify": True}, {"mmap": False}):
        with pytest.raises(CorruptSnapshotError, match=r"values-.*the saved bytes of the tensor 'values'"):
            SoftKVStore.load(tmp_path, **more)  # type: ignore[arg-type]


def test_ids_and_sizes_are_always_checked(tmp_path: Path) -> None:
    saved(tmp_path)
    (file,) = tmp_path.glob("rows.ids-*")
    flip(file, -1)
    with pytest.raises(CorruptSnapshotError, match=r"saved bytes of the tensor 'rows.ids'"):
        SoftKVStore.load(tmp_path, mmap=True)
    saved(tmp_path)
    (file,) = tmp_path.glob("keys-*")
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with pytest.raises(CorruptSnapshotError, match="bytes for the tensor 'keys'"):
        SoftKVStore.load(tmp_path, mmap=True)


def test_copies_of_a_mapped_store_own_their_rows(tmp_path: Path) -> None:
    saved(tmp_path)
    mapped = SoftKVStore.load(tmp_path, mmap=True)
    for copied in (copy.deepcopy(mapped), pickle.loads(pickle.dumps(mapped))):
        copied.materialize()
        assert copied.add(torch.ones(1, 4), torch.ones(1, 3)).item() == 50
    assert len(mapped) == 48


def test_an_empty_store_can_be_mapped(tmp_path: Path) -> None:
    SoftKVStore(4, 3).save(tmp_path)
    store = SoftKVStore.load(tmp_path, mmap=True)
    assert len(store) == 0
    assert (store(torch.ones(2, 4)) == 0).all()
    store.materialize()
    store.add(torch.ones(1, 4), torch.ones(1, 3))


def test_mapped_tensors_are_on_the_cpu(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(softdb.ArgumentError, match="device: expected the CPU with mmap=True"):
        SoftKVStore.load(tmp_path, mmap=True, device="meta")


MEMORY = """
import resource, sys
from softdb import SoftKVStore
SoftKVStore.load(sys.argv[1], mmap=True)  # what imports lazily
def used():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = used()
store = SoftKVStore.load(sys.argv[2], mmap=True)
grown = used() - before
assert len(store) == 2**18
resident, file = {}, ""  # bytes of each file that are in memory
for line in open("/proc/self/smaps"):
    name, *rest = line.split()
    if not name.endswith(":"):
        file = line.split("/")[-1].split("-")[0]
    elif name == "Rss:":
        resident[file] = resident.get(file, 0) + int(rest[0]) * 1024
print(grown, resident["keys"], resident["values"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_rows_are_not_read_before_they_are_used(tmp_path: Path) -> None:
    saved(tmp_path / "small")
    store = SoftKVStore(64, 64)
    rows = torch.randn(2**18, 64)
    store.add(rows, rows)  # 128 MiB
    store.save(tmp_path / "large")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    check_exit(done)
    grown, keys, values = map(int, done.stdout.split())
    # Ids and slots take up to 68 bytes a row while they load, one key or value takes 256.
    assert grown < 2**18 * 128
    assert keys < 2**20
    assert values < 2**20
