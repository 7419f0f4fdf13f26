"""Fuzzing of snapshot files by random recipes.

A recipe is the number of a store and a list of changes to its files. It consists of plain numbers, bytes and text, so
that a failing recipe can be added to `SEEDS`.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from softdb import NonFiniteError, SoftKVStore, snapshot
from support import faults
from support.damage import MANIFEST, examination, hash_of, header_of, outcome_of, sign_text
from support.faults import Report, content_of, contents, fill, make

# The number of a store, and changes: each a kind and its arguments.
Recipe = tuple[int, list[tuple[Any, ...]]]
STORES: list[dict[str, Any]] = [
    {"rows": 5},
    {"rows": 3, "capacity": 8, "evict": "lru", "track_usage": True, "trainable": True},
    {"rows": 0, "dtype": torch.bfloat16, "metric": "cosine"},
]
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
# Maximum size of a file that is rewritten to match the manifest.
MAX_FITTED_BYTES = 2**14

# Recipes that are always tried: former failures and edge cases.
SEEDS: list[Recipe] = [
    (0, []),
    (0, [("set", (2, 0, 3), [0, 2**62, 2**62]), ("fit", 0, 0)]),
    (2, [("set", (2, 0, 3), [2**62, 0, 2**62]), ("fit", 0, 0)]),
    (0, [("set", (2, 0, 3), [1] * 3000), ("fit", 0, 0)]),
    (0, [("set", (2, 0, 3), []), ("fit", 0, 0)]),
    (0, [("set", (2, 0, 2), "F64"), ("fit", 0, 0)]),
    (0, [("set", (2, 2, 3), []), ("fit", 2, 0)]),
    (0, [("set", (2, 2, 3), [5, 1]), ("fit", 2, 0)]),
    (0, [("set", (2, 2, 2), "F32"), ("fit", 2, 255)]),
    (0, [("set", (2, 0, 3), [5, 4]), ("fit", 0, 255)]),  # NaN
    (0, [("set", (2, 2, 3), [5]), ("fit", 2, 0)]),  # equal ids
    (0, [("set", (2, 2, 3), [5]), ("fit", 2, 255)]),  # no rows
    (0, [("set", (2, 5, 3), []), ("fit", 5, 127)]),  # exhausted ids
    (1, [("set", (1, 6), 10**400)]),
    (1, [("set", (1, 6), 2**62)]),
    (1, [("set", (1, 6), 5)]),
    (1, [("set", (1, 7), "oldest")]),
    (0, [("set", (1, 3), 10**400)]),
    (0, [("set", (1, 3), math.nan)]),
    (0, [("set", (1, 9, 1), [])]),
    (0, [("set", (1, 8), ["time", "time"])]),
    (0, [("set", (0,), True)]),
    (0, [("set", (), [])]),
    (0, [("drop", (2, 0))]),
    (0, [("drop", (1, 0))]),
    (0, [("double", (2, 0))]),
    (0, [("text", 1, b'"format": 1, ')]),
    (0, [("text", 0, b"[" * 10_000)]),
    (0, [("flip", 0, 3, 1), ("set", (2, 0, 4), "")]),
    (0, [("swap", 0, 1)]),
    (0, [("cut", 0, 0)]),
    (0, [("remove", 0)]),
    (0, [("rename", 0, MANIFEST)]),
]


@functools.cache
def original(number: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of a store, and its contents."""
    store = make(1.0, **STORES[number])
    with tempfile.TemporaryDirectory() as folder:
        store.save(folder)
        return content_of(Path(folder)), contents(store)


def apply_recipe(recipe: Recipe) -> tuple[dict[str, bytes], bool]:
    """Apply a recipe; return the files, and whether the manifest was changed and signed."""
    number, changes = recipe
    files, signs = dict(original(number)[0]), False
    for kind, *how in changes:
        if kind in ("set", "drop", "double", "text", "fit"):
            body = body_in(files)
            if body is not None:
                signs = change_body(files, body, kind, how) or signs
        else:
            change_files(files, kind, how)
    return files, signs


def body_in(files: dict[str, bytes]) -> Any:
    try:
        return json.loads(files[MANIFEST])["snapshot"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def change_files(files: dict[str, bytes], kind: str, how: list[Any]) -> None:
    listed = sorted(set(files) - {".lock"})
    if not listed:
        return
    name = listed[how[0] % len(listed)]
    content = files[name]
    if kind == "swap":
        other = listed[how[1] % len(listed)]
        files[name], files[other] = files[other], content
    elif kind == "remove":
        del files[name]
    elif kind == "rename":
        files[how[1] if "/" not in how[1] else "x"] = files.pop(name)
    elif content:
        place = how[1] % len(content)
        if kind == "flip":
            files[name] = content[:place] + bytes([content[place] ^ 1 << how[2] % 8]) + content[place + 1 :]
        elif kind == "cut":
            files[name] = content[:place]
        elif kind == "insert":
            files[name] = content[:place] + how[2] + content[place:]
        else:
            files[name] = content[:place] + content[place + how[2] :]


def change_body(files: dict[str, bytes], body: Any, kind: str, how: list[Any]) -> bool:
    """Change the body of the manifest and sign it; return whether it was changed."""
    if kind == "text":
        text = json.dumps(body).encode()
        place = how[0] % (len(text) + 1)
        files[MANIFEST] = sign_text(text[:place] + how[1] + text[place:])
        return True
    if kind == "fit":
        return fit_file(files, body, *how)
    parent, key, value = None, None, body
    for step in how[0]:  # each step is a position, modulo the length
        if not isinstance(value, (dict, list)) or not value:
            break
        parent, key = value, list(value)[step % len(value)] if isinstance(value, dict) else step % len(value)
        value = parent[key]
    if kind == "set":
        if parent is None:
            body = how[1]
        else:
            parent[key] = how[1]
    elif parent is None:
        return False
    elif kind == "drop":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, value)
    else:
        return False
    files[MANIFEST] = sign_text(json.dumps(body))
    return True


def fit_file(files: dict[str, bytes], body: Any, index: int, byte: int) -> bool:
    """Rewrite the file of a tensor to match its manifest entry, filled with a byte."""
    try:
        entry = body["tensors"][index % len(body["tensors"])]
        size = math.prod(entry["shape"]) * SIZES[entry["dtype"]]
        if not 0 <= size <= MAX_FITTED_BYTES or not isinstance(entry["file"], str) or "/" in entry["file"]:
            return False
        header = header_of(entry["name"], {n: entry[n] for n in ("dtype", "shape")} | {"data_offsets": [0, size]})
        files[entry["file"]] = header + bytes([byte]) * size
        entry["blake2b"] = hash_of(header, bytes([byte]) * size)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return False
    files[MANIFEST] = sign_text(json.dumps(body))
    return True


def violations(recipe: Recipe, folder: Path) -> list[str]:
    """Return the violations that a recipe causes."""
    files, signs = apply_recipe(recipe)
    path, found = folder / "fuzzed", []
    try:
        fill(path, files)
    except (OSError, ValueError):  # the file name is invalid
        return []
    loaded: list[SoftKVStore] = []
    read, message = outcome_of(lambda: snapshot.read_snapshot(path))
    known = ("fine", "corrupt", "newer", "missing")
    if read not in known:
        found.append(f"read_snapshot: {read}: {message}")
    mapped, message = outcome_of(lambda: snapshot.read_snapshot(path, mapped=WORDS))
    if mapped != read:
        found.append(f"read_snapshot: {read}, but {mapped} if mapped: {message}")
    unseen, message = outcome_of(lambda: snapshot.read_snapshot(path, mapped=WORDS, verify=False))
    if unseen not in known or (read == "fine") > (unseen == "fine"):
        found.append(f"read_snapshot: {read}, but {unseen} if mapped unverified: {message}")
    outcome, message = outcome_of(lambda: loaded.append(SoftKVStore.load(path)))
    if outcome not in known:
        found.append(f"load: {outcome}: {message}")
    examined = examination(path)
    if examined not in ("whole", "damaged", "newer", "missing") or (examined == "whole") != (read == "fine"):
        found.append(f"examine_snapshot: {examined}, but {read} to read")
    if outcome == "fine" and read != "fine":
        found.append(f"loaded, but {read} to read")
    if outcome != "fine" and examined == "whole" and not signs:
        found.append(f"examined it is whole, but {outcome} to load")
    if content_of(path) != files:
        found.append("the directory has changed")
    if loaded and not signs and contents(loaded[0]) != original(recipe[0])[1]:
        found.append("loaded another store than the saved one")
    if loaded and signs:  # a signed manifest may describe another store, which must be valid
        found += [f"what was loaded: {problem}" for problem in problems(loaded[0], folder / "again")]
    return found


def problems(store: SoftKVStore, path: Path) -> list[str]:
    """Return the problems of a loaded store."""
    try:
        store.save(path)
        same = contents(SoftKVStore.load(path)) == contents(store)
        if len(store.ids) != len(store) or len(store.ids.unique()) != len(store):
            return ["ids do not match the rows"]
        with suppress(NonFiniteError):  # non-finite keys may be loaded
            store.read(torch.zeros(1, store.key_dim, dtype=store.keys.dtype))
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return [] if same else ["differs after saving and loading again"]


# -- random recipes ----------------------------------------------------------------------------------------

# Capacities in between would allocate much memory, since a store allocates its capacity at once.
NUMBERS = st.integers(-3, 40) | st.sampled_from([2**44, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400])
WORDS = [
    *("keys", "values", "rows.ids", "rows.next_id", "rows.field_time", "rows.reads", "time", "", "../x", "a\0b"),
    *("F64", "F32", "F16", "BF16", "I64", "BOOL", "dot", "l2", "cosine", "lru", "oldest", "Flat", "auto", "IVF4,Flat"),
    *("keys-1.safetensors", "values-1.safetensors", "keys-2.safetensors", MANIFEST, ".lock", "größe", "\ud800"),
]


def values() -> st.SearchStrategy[Any]:
    """Return a strategy for JSON values."""
    leaves = NUMBERS | st.booleans() | st.none() | st.sampled_from(WORDS) | st.text(max_size=5) | st.floats()
    shapes = st.lists(NUMBERS, max_size=4)
    return leaves | shapes | st.recursive(leaves, _nested, max_leaves=6)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3
    )


def recipes() -> st.SearchStrategy[Recipe]:
    """Return a strategy for recipes of a few changes."""
    number, place = st.integers(0, 12), st.integers(0, 5000)
    anywhere = st.lists(number, max_size=4).map(tuple)
    # Tensor entries and settings are changed most often, since most checks concern them.
    entry = st.tuples(st.just(2), number, st.integers(0, 4))
    setting = st.tuples(st.just(1), number)
    where = anywhere | entry | setting
    some = st.binary(max_size=8) | st.sampled_from([b"[" * 3000, b"{", b'"', b"1" * 5000, b"\xff", b"NaN", b"1e999"])
    change = st.one_of(
        st.tuples(st.just("set"), where, values()),
        st.tuples(st.just("set"), entry.map(lambda one: (*one[:2], 3)), st.lists(st.integers(0, 6), max_size=3)),
        st.tuples(st.just("set"), entry.map(lambda one: (*one[:2], 2)), st.sampled_from(sorted(SIZES))),
        st.tuples(st.just("fit"), number, st.sampled_from([0, 1, 63, 127, 128, 255])),
        st.tuples(st.sampled_from(["drop", "double"]), where),
        st.tuples(st.just("text"), place, some),
        st.tuples(st.just("flip"), number, place, st.integers(0, 7)),
        st.tuples(st.just("cut"), number, place),
        st.tuples(st.just("insert"), number, place, some),
        st.tuples(st.just("delete"), number, place, st.integers(1, 64)),
        st.tuples(st.just("swap"), number, number),
        st.tuples(st.just("remove"), number),
        st.tuples(st.just("rename"), number, st.sampled_from(WORDS)),
    )
    return st.tuples(st.integers(0, len(STORES) - 1), st.lists(change, max_size=5))


def fuzz(report: Report, folder: Path, *, seconds: float, first: int = 0, batch: int = 500) -> None:
    """Try the recipes of `SEEDS`, then batches of random recipes until the time is over."""

    def try_recipe(recipe: Recipe) -> list[str]:
        found = violations(recipe, folder)
        outcome = outcome_of(lambda: SoftKVStore.load(folder / "fuzzed"))[0]
        report.outcomes[outcome if outcome in ("fine", "corrupt", "newer", "missing") else "another error"] += 1
        report.progress(report)
        return found

    for recipe in SEEDS:
        report.violations.extend(f"{recipe!r}: {found}" for found in try_recipe(recipe))
    end = time.monotonic() + seconds
    number = first
    while time.monotonic() < end:
        number += 1

        @seed(number)
        @settings(
            max_examples=batch,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(recipes())
        def harmless(recipe: Recipe) -> None:
            found = try_recipe(recipe)
            if found:
                raise AssertionError(f"{recipe!r}: {found}")

        try:
            with faults.skip_fsync():
                harmless()
        except Exception as error:
            if str(error) not in report.violations:
                report.violations.append(str(error))
