"""Load a snapshot: every byte of it is compared with its hash."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdb.errors import ArgumentError, CorruptSnapshotError
from softdb.snapshot.format import (
    DAMAGE,
    DATA_FILE,
    DTYPE_OF,
    FORMAT,
    MANIFEST,
    Entry,
    Sizes,
    bytes_of,
    is_name,
)
from softdb.snapshot.hashing import THREADS, Digest, Threads, hash_of
from softdb.snapshot.lock import directory_of

__all__ = ["check_hash", "check_size_and_header", "is_replaced", "open_file", "read_manifest", "read_snapshot"]


def read_snapshot(
    path: str | os.PathLike[str], *, mapped: Collection[str] = (), verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description in the directory ``path``, every byte compared with its hash.

    Args:
        path: The directory.
        mapped: The names of tensors that shall lie in their files: what is written to them stays in memory. Where a
            file is cut, or the disk fails, a look at them ends the process.
        verify: Whether these are compared with their hashes, too, which reads them.

    Raises:
        FileNotFoundError: There is no snapshot.
        CorruptSnapshotError: A file is not what it was when it was saved; it names the file and the tensor.
        ArgumentError: The snapshot was made by a newer softdb.
        OSError: The system refuses to read, which says nothing about the snapshot.
        MemoryError: It does not fit.
    """
    directory, tensors = directory_of(path), {}
    with ExitStack() as files:
        entries, description, sources = open_all(directory, files)
        threads = files.enter_context(Threads(THREADS))
        for entry, source in zip(entries, sources, strict=True):
            file = directory / entry.file
            check_size_and_header(file, entry, source)
            if entry.name not in mapped:
                tensors[entry.name] = _room_for(file, entry)
                check_hash(file, entry, source, threads, bytes_of(tensors[entry.name].reshape(-1)))
            else:
                if verify:
                    check_hash(file, entry, source, threads)
                tensors[entry.name] = _mapped(entry, source)
    return tensors, description


def open_all(directory: Path, files: ExitStack) -> tuple[list[Entry], dict[str, Any], list[Any]]:
    """What the manifest says, and the files that it names: while they are open, nobody can take them away."""
    while True:
        entries, description = read_manifest(directory / MANIFEST)
        with ExitStack() as opened:
            try:
                sources = [opened.enter_context(open_file(directory / entry.file)) for entry in entries]
            except CorruptSnapshotError:
                if not is_replaced(directory, entries):
                    raise
                continue
            files.enter_context(opened.pop_all())
            return entries, description, sources


def is_replaced(directory: Path, entries: list[Entry]) -> bool:
    """Whether somebody has saved since the manifest listed these."""
    return read_manifest(directory / MANIFEST)[0] != entries


def open_file(file: Path) -> Any:
    """A regular file, for reading; links are not followed."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # Others say nothing about the snapshot: who may read it, how many files are open, what the disk does.
        if error.errno not in DAMAGE or (isinstance(error, FileNotFoundError) and file.name == MANIFEST):
            raise
        raise CorruptSnapshotError(f"{file}: expected a file of the snapshot, got: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptSnapshotError(f"{file}: expected a regular file, got something else")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_manifest(file: Path) -> tuple[list[Entry], dict[str, Any]]:
    """Return the tensors that a manifest names, and what it says of the store."""
    with open_file(file) as source:
        size = os.fstat(source.fileno()).st_size
        most = Sizes.usual().manifest
        if size > most:
            raise CorruptSnapshotError(f"{file}: expected at most {most} bytes, got {size}")
        content = source.read(size)
    head, _, rest = content.partition(b"\n")
    body = rest.removesuffix(b"\n}\n")
    digest = hashlib.blake2b(body).hexdigest()
    if head != b'{"blake2b": "%s", "snapshot":' % digest.encode() or len(body) == len(rest):
        raise CorruptSnapshotError(f"{file}: expected what was saved, got other bytes: its hash differs")
    try:
        found = json.loads(body, object_pairs_hook=_without_duplicates)
        version = found["format"]
        if isinstance(version, int) and version > FORMAT:
            raise ArgumentError(
                f"path: expected a snapshot of format {FORMAT}, got {version}; update softdb to load it"
            )
        if version != FORMAT:
            raise ValueError(f"format {version!r}")
        entries = [_entry(one) for one in found["tensors"]]
        description = found["description"]
        names, files = {entry.name for entry in entries}, {entry.file for entry in entries}
        if not isinstance(description, dict) or len(names) < len(entries) or len(files) < len(entries):
            raise ValueError("a name twice")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise CorruptSnapshotError(f"{file}: expected the description of a snapshot, got {error}") from error
    return entries, description


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _entry(found: Any) -> Entry:
    name, file, dtype, shape, digest = (found[key] for key in ("name", "file", "dtype", "shape", "blake2b"))
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"the name {name!r}")
    if not isinstance(file, str) or not DATA_FILE.fullmatch(file):
        raise ValueError(f"the file name {file!r}")
    if (
        not isinstance(shape, list)
        or len(shape) > 64
        or not all(type(size) is int and 0 <= size < 2**63 for size in shape)
        or math.prod(size for size in shape if size) >= 2**63  # what torch could not count, of no rows either
    ):
        raise ValueError(f"the shape {shape!r}")
    if not isinstance(digest, str):
        raise ValueError("no hash")
    return Entry(name, file, DTYPE_OF[dtype], tuple(shape), digest)


def check_size_and_header(file: Path, entry: Entry, source: Any) -> None:
    """Raise unless an open file has the size and the header that the manifest says."""
    size, wanted = os.fstat(source.fileno()).st_size, len(entry.header) + entry.nbytes
    if size != wanted:
        raise CorruptSnapshotError(f"{file}: expected {wanted} bytes for the tensor {entry.name!r}, got {size}")
    if source.read(len(entry.header)) != entry.header:
        raise CorruptSnapshotError(f"{file}: expected the header of the tensor {entry.name!r}, got another")


def check_hash(
    file: Path,
    entry: Entry,
    source: Any,
    threads: Threads,
    into: memoryview | None = None,
    *,
    report: Callable[[int], None] | None = None,
) -> None:
    """Compare a file's hash with the manifest's, and read the tensor ``into`` memory on the way."""
    first, sizes = len(entry.header), Sizes.usual()

    def read(start: int) -> bytes:
        digest, size = hashlib.blake2b(), min(sizes.chunk, entry.nbytes - start)
        buffer = memoryview(bytearray(min(sizes.part, size))) if into is None else into[start : start + size]
        for place in range(0, size, sizes.part):
            part = buffer[: size - place] if into is None else buffer[place : place + sizes.part]
            if not fill(source.fileno(), part, first + start + place):
                raise CorruptSnapshotError(f"{file}: the tensor {entry.name!r} was cut while it was read")
            digest.update(part)
        return digest.digest()

    digest = Digest(threads)
    digest.add(len(entry.header), hash_of, entry.header)
    for start in range(0, entry.nbytes, sizes.chunk):
        digest.add(min(sizes.chunk, entry.nbytes - start), read, start)
        if report is not None:
            report(start)
    if digest.hexdigest() != entry.blake2b:
        raise CorruptSnapshotError(
            f"{file}: expected the tensor {entry.name!r} as saved, got other bytes: its hash differs"
        )


def fill(descriptor: int, place: memoryview, start: int) -> bool:
    """Read from a descriptor until the memory is full; return whether there were as many bytes."""
    while len(place):
        count = os.preadv(descriptor, [place], start)
        if not count:
            return False
        place, start = place[count:], start + count
    return True


def _room_for(file: Path, entry: Entry) -> Tensor:
    try:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    except RuntimeError as error:  # torch's for no memory
        raise MemoryError(
            f"{file}: there is no memory for the {entry.nbytes} bytes of the tensor {entry.name!r}; load(mmap=True) "
            "leaves keys and values where they are"
        ) from error


def _mapped(entry: Entry, source: Any) -> Tensor:
    """The tensor where it lies in its file; pages that are written to become the process's own."""
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    # Nobody is to set memory aside for pages that will not be written to: there may be more of them than memory.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    size = len(entry.header) + entry.nbytes
    memory = mmap.mmap(source.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    flat = torch.frombuffer(memory, dtype=entry.dtype, count=math.prod(entry.shape), offset=len(entry.header))
    return flat.view(entry.shape)
