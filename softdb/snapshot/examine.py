"""Examination of a snapshot, damaged or not, without loading it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from softdb.errors import CorruptSnapshotError
from softdb.snapshot.format import LOCK_FILE, MANIFEST
from softdb.snapshot.hashing import MAX_THREADS, ThreadPool
from softdb.snapshot.lock import resolve_directory
from softdb.snapshot.reader import check_hash, check_size_and_header, is_replaced, open_file, read_manifest

__all__ = ["Examination", "FileState", "examine_snapshot"]


class FileState(NamedTuple):
    """File of a snapshot, as the manifest describes it, and its problem, if any."""

    file: str
    tensor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    problem: str | None


class Examination(NamedTuple):
    """Result of `examine_snapshot`.

    Attributes:
        description: Description that was saved; None if the manifest is damaged.
        problem: Problem of the manifest, if any.
        files: Files that the manifest names.
        others: Names of other files in the directory. The next save removes the ones that are named like files of a
            snapshot.
    """

    description: dict[str, Any] | None
    problem: str | None
    files: list[FileState]
    others: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether every byte is equal to what was saved."""
        return self.problem is None and all(state.problem is None for state in self.files)


def examine_snapshot(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> Examination:
    """Compare every byte in the directory ``path`` with its hash; report damage.

    The cost is that of reading all files once. Tensors are not allocated.

    Args:
        path: Directory of the snapshot.
        progress: Function that is called with the number of bytes read so far, and the total number of bytes.

    Returns:
        An `Examination`.

    Raises:
        FileNotFoundError: There is no such directory, or no manifest in it.
        ArgumentError: The snapshot was made by a newer softdb.
    """
    directory = resolve_directory(path)
    present = [] if directory.is_file() else sorted(file.name for file in directory.iterdir())
    try:
        entries, description = read_manifest(directory / MANIFEST)
    except CorruptSnapshotError as error:
        return Examination(None, str(error), [], [name for name in present if name not in (MANIFEST, LOCK_FILE)])
    total = sum(len(entry.header) + entry.nbytes for entry in entries)
    done, states = 0, []
    with ThreadPool(MAX_THREADS) as threads:
        for entry in entries:
            file, problem = directory / entry.file, None

            def report(count: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + count, total)

            try:
                with open_file(file) as source:
                    check_size_and_header(file, entry, source)
                    check_hash(file, entry, source, threads, report=report)
            except CorruptSnapshotError as error:
                problem = str(error)
            done += len(entry.header) + entry.nbytes
            report(0, done)
            states.append(FileState(entry.file, entry.name, entry.dtype, entry.shape, entry.nbytes, problem))
    if any(state.problem for state in states) and is_replaced(directory, entries):
        return examine_snapshot(path, progress=progress)
    known = {MANIFEST, LOCK_FILE, *(entry.file for entry in entries)}
    return Examination(description, None, states, [name for name in present if name not in known])
