"""Save, load, map and verify snapshots, compared with copies of the files."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from harness import Case, main, measure_peak_memory

from softdb import SoftKVStore
from softdb.snapshot import examine_snapshot

WIDTH = 64


def cases(small: bool) -> Iterator[Case]:
    """Yield cases of save, load, a mapped load and verification."""
    rows = 10_000 if small else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / "store", Path(folder) / "copy"
        store = SoftKVStore(WIDTH, WIDTH)
        store.add(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH))
        store.save(path)
        peers = {"copy with fsync": lambda: copy_durably(path, other)}
        label = f"{rows:,} rows, {WIDTH}/{WIDTH}"
        limit = 1 / 0.6  # At least 60 % of the throughput of the copy.
        yield Case(
            f"save {label}",
            softdb={"save": lambda: store.save(path)},
            peers=peers,
            claims={("save", "copy with fsync"): limit},
            facts=lambda: measure_memory(lambda: store.save(path)),
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
            facts=lambda: measure_memory(lambda: SoftKVStore.load(path, mmap=True)),
        )
        yield Case(
            f"verify {label}",
            softdb={"verify": lambda: examine_snapshot(path)},
            peers={"read all bytes": lambda: read_files(path)},
            facts=lambda: {"GB/s": size / 1e9 / time_verification(path)},
        )


def copy_durably(path: Path, other: Path) -> None:
    """Copy the files of a directory, with fsync."""
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    for file in path.iterdir():
        shutil.copyfile(file, other / file.name)
        with open(other / file.name, "rb+") as copied:
            os.fsync(copied.fileno())


def read_files(path: Path) -> None:
    """Read every byte of a directory's files."""
    buffer = bytearray(2**23)
    for file in path.iterdir():
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def measure_memory(run: object) -> Mapping[str, float]:
    """Measure the peak increase of memory during ``run``."""
    return {"peak MiB": measure_peak_memory(run) / 2**20}  # type: ignore[arg-type]


def time_verification(path: Path) -> float:
    """Return the median of three times in seconds."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        examine_snapshot(path)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[1]


if __name__ == "__main__":
    main("snapshots", cases)
