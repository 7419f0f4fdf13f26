"""Saving and loading: what is on the disk is a whole snapshot, the old one or the new one, or an error."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import softdb
from softdb import CorruptSnapshotError, SoftKVStore, snapshot
from softdb.snapshot import read_snapshot, write_snapshot

FORK = multiprocessing.get_context("fork")


def make(value: float = 1.0, rows: int = 12, **options: Any) -> SoftKVStore:
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(4, 3, **options)
    fields = {name: torch.arange(rows) for name in store.fields}
    keys, values = torch.randn(rows, 4, generator=generator), torch.full((rows, 3), value)
    store.add(keys, values, fields=fields or None)
    return store


def value_of(path: Path) -> float:
    """Which store is in the directory."""
    store = SoftKVStore.load(path)
    assert len(store) == 12
    assert len(store.values.unique()) == 1
    return float(store.values[0, 0])


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


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
def test_what_is_loaded_is_what_was_saved(options: dict[str, Any], tmp_path: Path) -> None:
    store = make(**options)
    store.delete([3, 11])
    query = torch.randn(5, 4, dtype=store.keys.dtype)
    store.read(query, "topk", k=2)
    for _ in range(2):
        store.save(tmp_path / "store")
    loaded = SoftKVStore.load(tmp_path / "store")
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
    monkeypatch.setattr(snapshot, "CHUNK", 64)
    wide = torch.randn(9, 30).T
    write_snapshot(tmp_path, {"wide": wide, "none": torch.empty(0, 5), "one": torch.tensor(7)}, {"a": [1, None]})
    tensors, description = read_snapshot(tmp_path)
    assert torch.equal(tensors["wide"], wide)
    assert tensors["none"].shape == (0, 5)
    assert int(tensors["one"]) == 7
    assert description == {"a": [1, None]}


# -- damaged and hostile files ---------------------------------------------------------------------------


def saved(path: Path) -> Iterator[Path]:
    make().save(path)
    return (file for file in sorted(path.iterdir()) if file.name != ".lock")


def test_a_cut_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for file in saved(tmp_path):
        content = file.read_bytes()
        places = {*range(min(len(content), 140)), *range(0, len(content), 37), len(content) - 1}
        for place in places:
            file.write_bytes(content[:place])
            with pytest.raises(CorruptSnapshotError, match=file.name):
                SoftKVStore.load(tmp_path)
        for longer in (content + b"\0", content + content):
            file.write_bytes(longer)
            with pytest.raises(CorruptSnapshotError, match=file.name):
                SoftKVStore.load(tmp_path)
        file.unlink()
        with pytest.raises((CorruptSnapshotError, FileNotFoundError), match=file.name):
            SoftKVStore.load(tmp_path)
        file.write_bytes(content)
    assert value_of(tmp_path) == 1.0


def test_a_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    for file in saved(tmp_path):
        content = file.read_bytes()
        for place in range(0, len(content), 1 if len(content) < 400 else 7):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            with pytest.raises(CorruptSnapshotError, match=file.name):
                SoftKVStore.load(tmp_path)
        file.write_bytes(content)
    assert value_of(tmp_path) == 1.0


def sign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest with a right hash of wrong content."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())["snapshot"]
    text = change(body) or json.dumps(body)
    digest = hashlib.blake2b(text.encode()).hexdigest()
    file.write_bytes(f'{{"blake2b": "{digest}", "snapshot":\n{text}\n}}\n'.encode())


def setting(index: int, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["tensors"][index][key] = value

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "many dimensions": setting(0, "shape", [2**62, 2**62]),
    "a huge tensor": setting(0, "shape", [2**40, 4]),
    "negative": setting(0, "shape", [-12, -4]),
    "a float": setting(0, "shape", [12.0, 4]),
    "true": setting(0, "shape", [True, 48]),
    "above": setting(0, "file", "../keys-1.safetensors"),
    "absolute": setting(0, "file", "/etc/passwd"),
    "another's": setting(0, "file", "values-1.safetensors"),
    "no such dtype": setting(0, "dtype", "OBJECT"),
    "another dtype": setting(0, "dtype", "I64"),
    "a list for a dtype": setting(0, "dtype", ["F32"]),
    "no name": setting(0, "name", "../../x"),
    "a name twice": setting(0, "name", "values"),
    "one too few": lambda body: body["tensors"].pop() and None,
    "no list": lambda body: body.update(tensors=7),
    "no description": lambda body: body.pop("description") and None,
    "another metric": lambda body: body["description"].update(metric="manhattan"),
    "another width": lambda body: body["description"].update(key_dim=5),
    "an index of anything": lambda body: body["description"].update(index={"factory": "Flat", "evil": 1}),
    "deep": lambda body: "[" * 200_000,
    "no JSON": lambda body: "{'a': 1}",
    "keys twice": lambda body: '{"format": 1, "format": 1, "tensors": [], "description": {}}',
    "NaN": lambda body: '{"format": NaN}',
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_a_typed_error(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    make().save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    sign(tmp_path, change)
    with pytest.raises(CorruptSnapshotError):
        SoftKVStore.load(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")} == before


def test_a_newer_format_is_a_clear_error(tmp_path: Path) -> None:
    make().save(tmp_path)
    sign(tmp_path, lambda body: body.update(format=2))
    with pytest.raises(softdb.ArgumentError, match="format 1, got 2; update softdb"):
        SoftKVStore.load(tmp_path)


class Exploding:
    def __reduce__(self) -> Any:
        return os.abort, ()


def test_links_and_planted_files(tmp_path: Path) -> None:
    path, outside = tmp_path / "store", tmp_path / "outside"
    make().save(path)
    for name in ("keys.pkl", "data.pkl", "index.faiss", "keys-0.bin"):
        (path / name).write_bytes(pickle.dumps(Exploding()))
    assert value_of(path) == 1.0
    (file,) = path.glob("keys-*.safetensors")
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(CorruptSnapshotError, match=file.name):
        SoftKVStore.load(path)
    before = outside.read_bytes()
    make(2.0).save(path)  # the link goes, what it led to stays
    assert value_of(path) == 2.0
    assert outside.read_bytes() == before
    file = path / "manifest.json"
    file.rename(tmp_path / "manifest")
    file.symlink_to(tmp_path / "manifest")
    with pytest.raises(CorruptSnapshotError, match="manifest"):
        SoftKVStore.load(path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CorruptSnapshotError, match="regular file"):
        SoftKVStore.load(path)
    with pytest.raises(FileNotFoundError):
        SoftKVStore.load(tmp_path / "nowhere")
