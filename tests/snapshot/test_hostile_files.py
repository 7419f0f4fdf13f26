"""Damaged and hostile files, for which a load returns the saved store or raises a known error.

The campaigns are in `damage`; ``scripts/faults`` runs them at length.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support import damage, faults, fuzz
from support.faults import Report, contents, make, names, names_of_one, which

import softdb
from softdb import ArgumentError, CorruptSnapshotError, SoftKVStore
from softdb.snapshot import read_snapshot

GOLDEN = Path(__file__).parent / "golden" / "format-1"


def holds(campaign: Callable[..., Any], folder: Path, least: int, **options: Any) -> None:
    report = Report(campaign.__name__)
    campaign(report, folder, **options)
    assert report.violations == []
    assert report.cases >= least


# -- damage ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cut_file_is_an_error_that_names_it_and_its_tensor(tmp_path: Path) -> None:
    holds(damage.truncate_files, tmp_path, 700, every=53)


def test_a_flipped_bit_is_an_error_that_names_the_file_and_its_tensor(tmp_path: Path) -> None:
    holds(damage.flip_bits, tmp_path, 500, every=47, sampled=13)


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    holds(damage.fail_reads, tmp_path, 10)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    make().save(tmp_path)
    for file in sorted(set(names(tmp_path)) - {".lock"}):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).unlink()
        with pytest.raises((CorruptSnapshotError, FileNotFoundError), match=re.escape(file)):
            SoftKVStore.load(tmp_path)
        (tmp_path / file).write_bytes(content)
    assert which(tmp_path, {"same": make()}) == "same"


# -- hostile directories ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hostile_directory_is_a_typed_error_without_side_effects(tmp_path: Path) -> None:
    holds(damage.load_hostile_directories, tmp_path, len(damage.CASES))


@pytest.mark.parametrize("name", ["../x", "a\0b", "a\nb", "a b", "", ".", "\ud800"])
def test_an_invalid_tensor_name_is_refused_even_if_the_file_agrees(name: str, tmp_path: Path) -> None:
    make(rows=3).save(tmp_path)
    damage.replace(tmp_path, 0, damage.header_of(name, damage.GOOD), name=name)
    with pytest.raises(CorruptSnapshotError, match="the name"):
        read_snapshot(tmp_path)


@pytest.mark.parametrize("shape", [[True, 12], [1] * 65, [0, 2**62, 2**62], [0, 2**64]])
def test_an_invalid_shape_is_refused_even_if_the_file_agrees(shape: list[int], tmp_path: Path) -> None:
    make(rows=3).save(tmp_path)
    nbytes = 4 * math.prod(shape)
    header = damage.header_of("keys", {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]})
    damage.replace(tmp_path, 0, header, bytes(nbytes), shape=shape)
    with pytest.raises(CorruptSnapshotError, match="the shape"):
        read_snapshot(tmp_path)


def test_a_save_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    path, outside = tmp_path / "store", tmp_path / "outside"
    make().save(path)
    file = damage.keys_file(path)
    file.rename(outside)
    file.symlink_to(outside)
    before = outside.read_bytes()
    make(2.0).save(path)
    assert which(path, {"new": make(2.0)}) == "new"
    assert outside.read_bytes() == before
    assert names(path) == names_of_one(path)


def test_a_newer_format_is_a_clear_error(tmp_path: Path) -> None:
    make().save(tmp_path)
    damage.sign(tmp_path, lambda body: body.update(format=2))
    with pytest.raises(ArgumentError, match="format 1, got 2; update softdb"):
        SoftKVStore.load(tmp_path)


# -- what goes into a store, and is wrong ----------------------------------------------------------------

WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "keys of another width": lambda state: state.update(keys=torch.zeros(12, 5)),
    "values of another shape": lambda state: state.update(values=torch.zeros(12)),
    "too few ids": lambda state: state.update({"rows.ids": state["rows.ids"][:5]}),
    "NaN in keys": lambda state: state["keys"].__setitem__((3, 1), float("nan")),
    "infinity in values": lambda state: state["values"].__setitem__((3, 1), float("inf")),
    "an id twice": lambda state: state["rows.ids"].__setitem__(3, 4),
    "a column too short": lambda state: state.update({"rows.field_time": torch.zeros(3, dtype=torch.int64)}),
}
# What torch would report only after it had taken in the others.
HALF: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no values": lambda state: state.pop("values"),
    "no ids": lambda state: state.pop("rows.ids"),
    "one name too many": lambda state: state.update(more=torch.zeros(3)),
}


@pytest.mark.parametrize("change", (WRONG | HALF).values(), ids=WRONG | HALF)
def test_a_state_that_cannot_be_loaded_leaves_the_store_as_it_was(change: Callable[[dict[str, Any]], Any]) -> None:
    store, other = make(1.0), make(2.0)
    other.update(other.ids, keys=torch.ones(12, 4))
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    change(state)
    before = contents(store)
    query = torch.ones(2, 4)
    answer = store.read(query).values
    with pytest.raises((softdb.SoftDBError, RuntimeError)):
        store.load_state_dict(state)
    assert contents(store) == before
    assert torch.equal(store.read(query).values, answer)


# -- snapshots of earlier versions -----------------------------------------------------------------------

# The sha256 of each file, so that no change of them goes unnoticed.
GOLDEN_FILES = {
    "keys-1.safetensors": "9c8ce4aed8249f57fb3f19da3a0196058b1f1a17684d0dc781974ece17db35a1",
    "manifest.json": "ee5094de21f92ebc0d0143e7d6d55d614146548cbb02bd2a50ba5c10c688f734",
    "rows.field_time-1.safetensors": "97ac69a6b7b9cbe639741ce5e55b074dbd400b6e832c8593a4fa96ab4d3bb10f",
    "rows.generation-1.safetensors": "41f0c0773240170953bf5102200cc455ca317eb607d2457aa51fbb92e8ee8de8",
    "rows.ids-1.safetensors": "4c6089ee23fd20d5f975b16b6fd40a976f15d333c9b14500ecacdff194ba0516",
    "rows.next_id-1.safetensors": "eb13e11034f04af6c826b4121ba4efbd6e4c7ad5d832327c60eaf5087e6e89e5",
    "rows.reads-1.safetensors": "4456570fc30f062152c3a23bc30f26076b00037c085811aaa111239c3b87a606",
    "rows.used_at-1.safetensors": "e091e184ccd4e4aab0aabf8e887ca9a491f5382d0474315f7b6546257ba248a9",
    "rows.weight-1.safetensors": "cca11cd40835ec58806a519432943ed5f3353f522cfda9da708257d6285421e2",
    "values-1.safetensors": "0f17d1697a5451bb8c7cde487c0e87bea6862fc7bf1d0ed07bee2d0724c5a34c",
}


def test_a_snapshot_of_format_1_can_be_loaded() -> None:
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in GOLDEN.iterdir()}
    assert found == GOLDEN_FILES
    store = SoftKVStore.load(GOLDEN)
    assert (store.key_dim, store.value_dim, store.metric, store.temperature) == (2, 1, "l2", 0.5)
    assert (store.capacity, store.evict, store.fields, store.trainable) == (5, "lru", ("time",), True)
    assert store.index_stats().factory == "Flat"
    assert store.ids.tolist() == [10, 12, 13]
    rows = store.get([10, 12, 13])
    assert rows.keys.tolist() == [[0.5, -1.0], [2.0, 0.25], [1.5, 1.5]]
    assert rows.values.tolist() == [[1.0], [3.0], [4.0]]
    assert rows.fields["time"].tolist() == [100, 300, 400]
    assert store.usage.reads.tolist() == [1, 0, 1]
    assert store.read(torch.tensor([0.5, -1.0]), "hard").ids.tolist() == [10]
    assert store.add(torch.zeros(1, 2), torch.zeros(1, 1), fields={"time": [0]}).tolist() == [14]


# -- anything ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", fuzz.SEEDS, ids=[str(number) for number in range(len(fuzz.SEEDS))])
def test_a_known_attack_does_no_harm(recipe: Any, tmp_path: Path) -> None:
    assert fuzz.violations(recipe, tmp_path) == []


@pytest.mark.slow
def test_loading_changed_files_returns_the_store_or_a_known_error(tmp_path: Path) -> None:
    @settings(
        max_examples=50,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(fuzz.recipes())
    def harmless(recipe: Any) -> None:
        assert fuzz.violations(recipe, tmp_path) == []

    with faults.skip_fsync():
        harmless()
