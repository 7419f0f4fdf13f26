"""Saving and loading of complete snapshots."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import damage
from support.programs import check_exit

import softdb
from softdb import SoftKVStore
from softdb.snapshot import examine_snapshot, lock_directory, read_snapshot, write_snapshot
from softdb.snapshot.format import Sizes

pytestmark = pytest.mark.each_device


def make(value: float = 1.0, rows: int = 12, **options: Any) -> SoftKVStore:
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(4, 3, **options)
    fields = {name: torch.arange(rows) for name in store.fields}
    keys, values = torch.randn(rows, 4, generator=generator), torch.full((rows, 3), value)
    store.add(keys, values, fields=fields or None)
    return store


# -- round trips -----------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "trainable": {"trainable": True, "sparse_grad": False, "metric": "l2", "temperature": 0.5},
    "fields": {"fields": ("time", "group"), "index": softdb.IndexConfig("IVF2,Flat", recall=0.8)},
    "lru": {"capacity": 40, "evict": "lru", "track_usage": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64, "metric": "cosine"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_loaded_store_equals_the_saved_one(options: dict[str, Any], tmp_path: Path) -> None:
    store = make(**options)
    store.delete([3, 11])
    query = torch.randn(5, 4, dtype=store.keys.dtype)
    store.read(query, "topk", k=2)
    for _ in range(2):
        store.save(tmp_path / "store")
    loaded = SoftKVStore.load(tmp_path / "store", device=store.device)
    assert loaded.extra_repr() == store.extra_repr()
    assert loaded._index.config == store._index.config
    used, found = store.rows.used, loaded.state_dict()
    for name, tensor in store.state_dict().items():
        assert torch.equal(
            found[name][:used] if tensor.dim() else found[name], tensor[:used] if tensor.dim() else tensor
        )
    assert torch.equal(loaded.read(query, k=3).values, store.read(query, k=3).values)
    assert torch.equal(loaded.ids, store.ids)
    fields = {name: [5] for name in store.fields} or None
    new = [one.add(torch.ones(1, 4), torch.ones(1, 3), fields=fields).item() for one in (store, loaded)]
    assert new == [12, 12]  # ids keep rising
    if options.get("track_usage"):
        assert torch.equal(loaded.usage.reads, store.usage.reads)


def test_an_empty_store(tmp_path: Path) -> None:
    SoftKVStore(4, 3).save(tmp_path)
    assert len(SoftKVStore.load(tmp_path)) == 0


def test_files_are_safetensors(tmp_path: Path) -> None:
    store = make()
    store.save(tmp_path)
    (file,) = tmp_path.glob("keys-*.safetensors")
    assert torch.equal(safetensors.torch.load_file(file)["keys"], store.keys[:12])


def test_a_strided_tensor_and_one_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sizes, "default", lambda: Sizes(chunk=64))
    wide = torch.randn(9, 30).T
    with lock_directory(tmp_path, 0.0) as directory:
        write_snapshot(directory, {"wide": wide, "none": torch.empty(0, 5), "one": torch.tensor(7)}, {"a": [1, None]})
    tensors, description = read_snapshot(tmp_path)
    assert torch.equal(tensors["wide"], wide)
    assert tensors["none"].shape == (0, 5)
    assert int(tensors["one"]) == 7
    assert description == {"a": [1, None]}


@pytest.mark.parametrize("timeout", ["a minute", None, -1, float("nan")])
def test_an_invalid_timeout_is_refused_before_a_directory_is_created(timeout: Any, tmp_path: Path) -> None:
    with pytest.raises(softdb.SoftDBError, match="timeout: expected"):
        make().save(tmp_path / "store", timeout=timeout)
    assert not (tmp_path / "store").exists()
    make().save(tmp_path / "store", timeout=float("inf"))


@pytest.mark.parametrize("path", [b"path", 3, None, "a\0b"], ids=repr)
def test_an_invalid_path_is_a_typed_error(path: Any) -> None:
    wanted = softdb.ArgumentError if isinstance(path, str) else softdb.DtypeError
    for call in (SoftKVStore(4, 2).save, SoftKVStore.load, examine_snapshot):
        with pytest.raises(wanted, match=r"^path: expected a "):
            call(path)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta", 3.5, "cpu:-7"])
@pytest.mark.parametrize("mmap", [False, True])
def test_an_unavailable_device_is_not_reported_as_corruption(device: Any, mmap: bool, tmp_path: Path) -> None:
    SoftKVStore(4, 2).save(tmp_path)
    with pytest.raises(softdb.ArgumentError, match=r"^device: expected ") as caught:
        SoftKVStore.load(tmp_path, device=device, mmap=mmap)
    assert not isinstance(caught.value, softdb.CorruptSnapshotError)


def test_a_mapped_store_is_on_the_cpu_with_any_default_device(tmp_path: Path) -> None:
    store = SoftKVStore(4, 2)
    store.add(torch.eye(4), torch.ones(4, 2))
    store.save(tmp_path)
    with torch.device("meta"):
        loaded = SoftKVStore.load(tmp_path, mmap=True)
    assert torch.equal(loaded.keys, torch.eye(4))


AT_THE_END = """
import atexit, sys, threading, time
import torch
from softdb import SoftKVStore

store = SoftKVStore(4, 2)
store.add(torch.eye(4), torch.ones(4, 2))

def save():
    if threading.current_thread() is not threading.main_thread():
        threading.main_thread().join()
        time.sleep(0.1)
    store.save(sys.argv[1])
    print(len(SoftKVStore.load(sys.argv[1])), flush=True)

if sys.argv[2] == "atexit":
    atexit.register(save)
else:
    threading.Thread(target=save).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["atexit", "thread"])
def test_a_store_can_be_saved_during_interpreter_shutdown(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_THE_END, str(tmp_path / "saved"), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    check_exit(done)
    assert done.stdout == "4\n"
    assert len(SoftKVStore.load(tmp_path / "saved")) == 4


def test_a_store_can_be_saved_if_no_thread_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    make(3.0).save(tmp_path)
    make(4.0).save(tmp_path)
    assert bool((SoftKVStore.load(tmp_path).values == 4.0).all())
    assert len(list(tmp_path.iterdir())) == len(list(tmp_path.glob("*-2.safetensors"))) + 2  # the old files are gone
    file = next(tmp_path.glob("values-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(softdb.CorruptSnapshotError, match="the hash differs"):
        SoftKVStore.load(tmp_path)


# -- memory that runs out ----------------------------------------------------------------------------------

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4096 bytes. Error code 12 (Cannot allocate memory)"
)
SHORTAGES = {
    "torch on Linux": RuntimeError(ALLOCATOR),
    "torch on Windows": RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory"),
    "Python": MemoryError(),
    "a device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4096 bytes"),
}


@pytest.mark.parametrize("shortage", SHORTAGES.values(), ids=SHORTAGES)
@pytest.mark.parametrize(
    "place", ["softdb.snapshot.contents.resize", "torch.zeros", "softdb.table.slots.SlotTable.put"]
)
def test_a_load_without_memory_is_not_reported_as_corruption(
    shortage: Exception, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(capacity=40).save(tmp_path)

    def refuse(*args: Any, **options: Any) -> Any:
        raise shortage

    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        with pytest.raises((MemoryError, torch.OutOfMemoryError)) as caught:
            SoftKVStore.load(tmp_path)
    assert not isinstance(caught.value, softdb.SoftDBError)
    assert len(SoftKVStore.load(tmp_path)) == 12


def test_a_capacity_beyond_memory_is_not_reported_as_corruption(tmp_path: Path) -> None:
    make().save(tmp_path)
    damage.sign(tmp_path, lambda body: body["description"].update(capacity=2**50))
    with pytest.raises(MemoryError, match="not enough memory"):
        SoftKVStore.load(tmp_path)
    assert examine_snapshot(tmp_path).is_whole


# -- rows that are frozen ----------------------------------------------------------------------------------

COPIES: dict[str, Callable[[SoftKVStore, Path], SoftKVStore]] = {
    "save and load": lambda store, path: store.save(path) or SoftKVStore.load(path, device=store.device),  # type: ignore[func-returns-value]
    "mapped and materialized": lambda store, path: materialized(store, path),
    "mapped, saved, loaded": lambda store, path: saved_from_files(store, path),
    "deepcopy": lambda store, path: copy.deepcopy(store),
    "pickle": lambda store, path: pickle.loads(pickle.dumps(store)),
    "growth": lambda store, path: store.reserve(1000) or store,  # type: ignore[func-returns-value]
    "to": lambda store, path: store.to(torch.float64),
    "to_empty": lambda store, path: store.to_empty(device=store.device),
    "load_state_dict": lambda store, path: loaded_from(store, assign=False),
    "load_state_dict(assign=True)": lambda store, path: loaded_from(store, assign=True),
    "eviction and revival": lambda store, path: store.revive([0], torch.ones(1, 4), torch.ones(1, 3)) or store,  # type: ignore[func-returns-value]
}


def materialized(store: SoftKVStore, path: Path) -> SoftKVStore:
    store.save(path)
    mapped = SoftKVStore.load(path, mmap=True)
    assert not mapped.keys.requires_grad
    assert not mapped.values.requires_grad
    mapped.materialize()
    return mapped


def saved_from_files(store: SoftKVStore, path: Path) -> SoftKVStore:
    store.save(path)
    SoftKVStore.load(path, mmap=True).save(path / "again")
    return SoftKVStore.load(path / "again")


def loaded_from(store: SoftKVStore, *, assign: bool) -> SoftKVStore:
    store.load_state_dict(make(2.0, rows=30, trainable=True).state_dict(), assign=assign)
    return store


@pytest.mark.parametrize("frozen", [(), ("keys",), ("values",), ("keys", "values")], ids=str)
@pytest.mark.parametrize("way", COPIES)
def test_frozen_keys_and_values_stay_frozen(way: str, frozen: tuple[str, ...], tmp_path: Path) -> None:
    store = make(trainable=True)
    for name in frozen:
        getattr(store, name).requires_grad_(False)
    store = COPIES[way](store, tmp_path)
    assert isinstance(store.keys, torch.nn.Parameter)
    assert {name for name in ("keys", "values") if not getattr(store, name).requires_grad} == set(frozen)


def test_a_snapshot_without_a_frozen_entry_is_trainable(tmp_path: Path) -> None:
    make(trainable=True).save(tmp_path)
    damage.sign(tmp_path, lambda body: body["description"].pop("frozen", None))
    assert SoftKVStore.load(tmp_path).keys.requires_grad
    make(trainable=True).save(tmp_path)
    for wrong in (["rows"], "keys", 3, None):
        damage.sign(tmp_path, lambda body, wrong=wrong: body["description"].update(frozen=wrong))
        with pytest.raises(softdb.CorruptSnapshotError, match="frozen"):
            SoftKVStore.load(tmp_path)
