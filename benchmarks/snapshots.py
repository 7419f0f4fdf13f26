"""Saving and loading beside a copy of the same files with fsync; what a mapped load takes; how fast hashes are."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from harness import Case, main, peak_memory

from softdb import SoftKVStore
from softdb.snapshot import examine_snapshot

WIDTH = 64


def cases(small: bool) -> Iterator[Case]:
    """Save, load, map, verify."""
    rows = 10_000 if small else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / "store", Path(folder) / "copy"
        store = SoftKVStore(WIDTH, WIDTH)
        store.add(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH))
        store.save(path)
        peers = {"copy with fsync": lambda: copy(path, other)}
        label = f"{rows:,} rows, {WIDTH}/{WIDTH}"
        limit = 1 / 0.6  # at least 60 % of the throughput
        yield Case(
            f"save {label}",
            softdb={"save": lambda: store.save(path)},
            peers=peers,
            claims={("save", "copy with fsync"): limit},
            facts=lambda: memory(lambda: store.save(path)),
        )
        yield Case(
            f"load {label}",
            softdb={"load": lambda: SoftKVStore.load(path)},
            peers=peers,
            claims={("load", "copy with fsync"): limit},
        )
        size = sum(file.stat().st_size for file in path.iterdir())
        yield Case(
            f"map {label}",
            softdb={"load(mmap=True)": lambda: SoftKVStore.load(path, mmap=True)},
            peers={"load": lambda: SoftKVStore.load(path)},
            facts=lambda: memory(lambda: SoftKVStore.load(path, mmap=True)),
        )
        yield Case(
            f"verify {label}",
            softdb={"verify": lambda: examine_snapshot(path)},
            peers={"read all bytes": lambda: read(path)},
            facts=lambda: {"GB/s": size / 1e9 / seconds(path)},
        )


def copy(path: Path, other: Path) -> None:
    """What anybody has to do who wants these bytes on the disk."""
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    for file in path.iterdir():
        shutil.copyfile(file, other / file.name)
        with open(other / file.name, "rb+") as copied:
            os.fsync(copied.fileno())


def read(path: Path) -> None:
    """Every byte, once."""
    buffer = bytearray(2**23)
    for file in path.iterdir():
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def memory(run: object) -> Mapping[str, float]:
    """What it takes beyond what there is."""
    return {"peak MiB": peak_memory(run) / 2**20}  # type: ignore[arg-type]


def seconds(path: Path) -> float:
    """The median of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        examine_snapshot(path)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[1]


if __name__ == "__main__":
    main("snapshots", cases)
