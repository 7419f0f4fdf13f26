"""Reader of snapshots, which compares files with their hashes."""

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
    DAMAGE_ERRNOS,
    DATA_FILE_PATTERN,
    DTYPES_BY_NAME,
    FORMAT,
    MANIFEST,
    Entry,
    Sizes,
    is_name,
    view_bytes,
)
from softdb.snapshot.hashing import MAX_THREADS, FileHash, ThreadPool, compute_hash
from softdb.snapshot.lock import resolve_directory

__all__ = ["check_hash", "check_size_and_header", "is_replaced", "open_file", "read_manifest", "read_snapshot"]


def read_snapshot(
    path: str | os.PathLike[str], *, mapped: Collection[str] = (), verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the description in the directory ``path``.

    Args:
        path: Directory of the snapshot.
        mapped: Names of tensors whose files are mapped into memory. Writes to these tensors do not reach the files. If
            a mapped file is truncated or the disk fails, an access to its tensor ends the process.
        verify: Whether to compare mapped tensors with their hashes, which reads them.

    Returns:
        The tensors by name, and the description.

    Raises:
        FileNotFoundError: There is no snapshot.
        CorruptSnapshotError: A file differs from what was saved. The message names the file and the tensor.
        ArgumentError: The snapshot was made by a newer softdb.
        OSError: The system cannot read a file. The snapshot may be valid.
        MemoryError: The tensors do not fit in memory.
    """
    directory, tensors = resolve_directory(path), {}
    with ExitStack() as files:
        entries, description, sources = open_snapshot_files(directory, files)
        threads = files.enter_context(ThreadPool(MAX_THREADS))
        for entry, source in zip(entries, sources, strict=True):
            file = directory / entry.file
            check_size_and_header(file, entry, source)
            if entry.name not in mapped:
                tensors[entry.name] = _allocate(file, entry)
                check_hash(file, entry, source, threads, view_bytes(tensors[entry.name].reshape(-1)))
            else:
                if verify:
                    check_hash(file, entry, source, threads)
                tensors[entry.name] = _map_tensor(entry, source)
    return tensors, description


def open_snapshot_files(directory: Path, files: ExitStack) -> tuple[list[Entry], dict[str, Any], list[Any]]:
    """Read the manifest and open the files that it names.

    A concurrent save may remove files. Once they are open, they remain readable.
    """
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
    """Return whether a save has replaced the manifest that listed these entries."""
    return read_manifest(directory / MANIFEST)[0] != entries


def open_file(file: Path) -> Any:
    """Open a regular file for reading; do not follow symbolic links."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # Other errors (permissions, the limit of open files, the disk) do not mean that the snapshot is corrupt.
        if error.errno not in DAMAGE_ERRNOS or (isinstance(error, FileNotFoundError) and file.name == MANIFEST):
            raise
        raise CorruptSnapshotError(f"{file}: expected a file of the snapshot, got: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptSnapshotError(f"{file}: expected a regular file, got something else")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_manifest(file: Path) -> tuple[list[Entry], dict[str, Any]]:
    """Read the entries and the description of a manifest."""
    with open_file(file) as source:
        size = os.fstat(source.fileno()).st_size
        most = Sizes.default().manifest
        if size > most:
            raise CorruptSnapshotError(f"{file}: expected at most {most} bytes, got {size}")
        content = source.read(size)
    head, _, rest = content.partition(b"\n")
    body = rest.removesuffix(b"\n}\n")
    digest = hashlib.blake2b(body).hexdigest()
    if head != b'{"blake2b": "%s", "snapshot":' % digest.encode() or len(body) == len(rest):
        raise CorruptSnapshotError(f"{file}: expected the saved bytes, got others: the hash differs")
    try:
        found = json.loads(body, object_pairs_hook=_reject_duplicates)
        version = found["format"]
        if isinstance(version, int) and version > FORMAT:
            raise ArgumentError(
                f"path: expected a snapshot of format {FORMAT}, got {version}; update softdb to load it"
            )
        if version != FORMAT:
            raise ValueError(f"format {version!r}")
        entries = [_parse_entry(one) for one in found["tensors"]]
        description = found["description"]
        names, files = {entry.name for entry in entries}, {entry.file for entry in entries}
        if not isinstance(description, dict) or len(names) < len(entries) or len(files) < len(entries):
            raise ValueError("a duplicate name")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise CorruptSnapshotError(f"{file}: expected the description of a snapshot, got {error}") from error
    return entries, description


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a duplicate key")
    return found


def _parse_entry(found: Any) -> Entry:
    name, file, dtype, shape, digest = (found[key] for key in ("name", "file", "dtype", "shape", "blake2b"))
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"the name {name!r}")
    if not isinstance(file, str) or not DATA_FILE_PATTERN.fullmatch(file):
        raise ValueError(f"the file name {file!r}")
    if (
        not isinstance(shape, list)
        or len(shape) > 64
        or not all(type(size) is int and 0 <= size < 2**63 for size in shape)
        or math.prod(size for size in shape if size) >= 2**63  # torch cannot count more elements
    ):
        raise ValueError(f"the shape {shape!r}")
    if not isinstance(digest, str):
        raise ValueError("no hash")
    return Entry(name, file, DTYPES_BY_NAME[dtype], tuple(shape), digest)


def check_size_and_header(file: Path, entry: Entry, source: Any) -> None:
    """Raise unless an open file has the size and header that the manifest describes."""
    size, wanted = os.fstat(source.fileno()).st_size, len(entry.header) + entry.nbytes
    if size != wanted:
        raise CorruptSnapshotError(f"{file}: expected {wanted} bytes for the tensor {entry.name!r}, got {size}")
    if source.read(len(entry.header)) != entry.header:
        raise CorruptSnapshotError(f"{file}: expected the header of the tensor {entry.name!r}, got another header")


def check_hash(
    file: Path,
    entry: Entry,
    source: Any,
    threads: ThreadPool,
    into: memoryview | None = None,
    *,
    report: Callable[[int], None] | None = None,
) -> None:
    """Compare the hash of a file with that of the manifest.

    Args:
        file: Path of the file, for messages.
        entry: Entry of the manifest.
        source: Open file, positioned after its header.
        threads: Thread pool.
        into: Memory that receives the bytes of the tensor, or None.
        report: Function that is called with the number of bytes read so far.
    """
    first, sizes = len(entry.header), Sizes.default()

    def read(start: int) -> bytes:
        digest, size = hashlib.blake2b(), min(sizes.chunk, entry.nbytes - start)
        buffer = memoryview(bytearray(min(sizes.part, size))) if into is None else into[start : start + size]
        for place in range(0, size, sizes.part):
            part = buffer[: size - place] if into is None else buffer[place : place + sizes.part]
            if not read_into(source.fileno(), part, first + start + place):
                raise CorruptSnapshotError(f"{file}: the tensor {entry.name!r} was truncated during the read")
            digest.update(part)
        return digest.digest()

    digest = FileHash(threads)
    digest.add(len(entry.header), compute_hash, entry.header)
    for start in range(0, entry.nbytes, sizes.chunk):
        digest.add(min(sizes.chunk, entry.nbytes - start), read, start)
        if report is not None:
            report(start)
    if digest.hexdigest() != entry.blake2b:
        raise CorruptSnapshotError(
            f"{file}: expected the saved bytes of the tensor {entry.name!r}, got others: the hash differs"
        )


def read_into(descriptor: int, place: memoryview, start: int) -> bool:
    """Read from a descriptor until the memory is full; return whether it is."""
    while len(place):
        count = os.preadv(descriptor, [place], start)
        if not count:
            return False
        place, start = place[count:], start + count
    return True


def _allocate(file: Path, entry: Entry) -> Tensor:
    try:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    except RuntimeError as error:  # raised by torch if memory is not sufficient
        raise MemoryError(
            f"{file}: not enough memory for the {entry.nbytes} bytes of the tensor {entry.name!r}; load(mmap=True) "
            "leaves keys and values in their files"
        ) from error


def _map_tensor(entry: Entry, source: Any) -> Tensor:
    """Map the file of a tensor; a write copies the page and does not reach the file."""
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    # No memory is reserved for pages that are not written to: a file may be larger than the memory.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    size = len(entry.header) + entry.nbytes
    memory = mmap.mmap(source.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    flat = torch.frombuffer(memory, dtype=entry.dtype, count=math.prod(entry.shape), offset=len(entry.header))
    return flat.view(entry.shape)
