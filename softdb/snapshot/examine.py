"""Look at a snapshot, damaged or not, without loading it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from softdb.errors import CorruptSnapshotError
from softdb.snapshot.format import LOCK, MANIFEST
from softdb.snapshot.hashing import THREADS, Threads
from softdb.snapshot.lock import directory_of
from softdb.snapshot.reader import check_hash, check_size_and_header, is_replaced, open_file, read_manifest

__all__ = ["Examination", "FileState", "examine_snapshot"]


class FileState(NamedTuple):
    """A file of a snapshot, as the manifest describes it, and what is wrong with it, if anything."""

    file: str
    tensor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    problem: str | None


class Examination(NamedTuple):
    """What `examine_snapshot` found.

    Attributes:
        description: As it was saved; None if the manifest is not what was written.
        problem: What is wrong with the manifest, if anything.
        files: Those that it names.
        others: The names of files in the directory that belong to nobody; the next save removes those of them that are
            named like a snapshot's.
    """

    description: dict[str, Any] | None
    problem: str | None
    files: list[FileState]
    others: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether every byte is what was saved."""
        return self.problem is None and all(state.problem is None for state in self.files)


def examine_snapshot(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> Examination:
    """Compare every byte in the directory ``path`` with its hash, and tell what is found, also of a damaged snapshot.

    Args:
        path: The directory.
        progress: Is told how many bytes have been read, and how many there are.

    Raises:
        FileNotFoundError: There is no such directory, or no manifest in it.
        ArgumentError: The snapshot was made by a newer softdb.
    """
    directory = directory_of(path)
    present = [] if directory.is_file() else sorted(file.name for file in directory.iterdir())
    try:
        entries, description = read_manifest(directory / MANIFEST)
    except CorruptSnapshotError as error:
        return Examination(None, str(error), [], [name for name in present if name not in (MANIFEST, LOCK)])
    total = sum(len(entry.header) + entry.nbytes for entry in entries)
    done, states = 0, []
    with Threads(THREADS) as threads:
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
    known = {MANIFEST, LOCK, *(entry.file for entry in entries)}
    return Examination(description, None, states, [name for name in present if name not in known])
