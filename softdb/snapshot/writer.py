"""Save a snapshot: files first, then the manifest that names them, in the place of the old one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from softdb.errors import ArgumentError
from softdb.snapshot.format import (
    DATA_FILE,
    DRAFT,
    DTYPES,
    FORMAT,
    MANIFEST,
    Entry,
    Sizes,
    bytes_of,
    is_name,
)
from softdb.snapshot.hashing import THREADS, Digest, Threads, hash_of
from softdb.snapshot.lock import sync_directory

__all__ = ["write_snapshot"]

LARGEST = 10**18 - 1  # generation that these names have room for


def write_snapshot(directory: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Make a directory hold these tensors and this description, durably, or leave it as it was; within `locked`.

    Args:
        directory: That is `locked`.
        tensors: By name.
        description: What JSON can hold.

    Raises:
        OSError: The system refuses; the snapshot that was there is intact.
        ArgumentError: There are more tensors than a manifest has room for, or they are of a type that none has.
    """
    swapping = False
    generation = 1 + max((number for _, number in _numbered(directory) if number < LARGEST), default=0)
    written: list[Path] = []
    _make_room(file for file, _ in _numbered(directory))
    try:
        with _Writer() as writer:
            for name, tensor in tensors.items():
                file = directory / _file_name(name, generation, {file.name for file in written})
                written.append(file)
                writer.write(file, name, tensor)
            entries = writer.finish()
        draft = directory / f"{MANIFEST}-{generation}"
        written.append(draft)
        manifest = _manifest(entries, description)
        most = Sizes.usual().manifest
        if len(manifest) > most:
            raise ArgumentError(f"tensors: expected what a manifest of {most} bytes has room for, got {len(tensors)}")
        _write_bytes(draft, manifest)
        sync_directory(directory)
        swapping = True
        os.replace(draft, directory / MANIFEST)
    except BaseException:
        # An interrupt, or a disk far away, may report an error after the manifest has been swapped.
        for file in written if not swapping or os.path.exists(draft) else []:
            with suppress(OSError):
                file.unlink()
        raise
    sync_directory(directory)
    kept = {entry.file for entry in entries}
    with Threads(THREADS) as threads:  # it takes the system a tenth of a second for a gigabyte
        for file in [file for file, _ in _numbered(directory) if file.name not in kept]:
            threads.submit(file.unlink)  # what cannot be removed is left to the next save


def _make_room(files: Iterable[Path]) -> None:
    """Let new files have the memory that the system keeps what is in these in: they are about to go."""
    for file in files:
        with suppress(OSError, AttributeError):  # it is advice, which not every system takes
            if file.lstat().st_size > Sizes.usual().sync:
                descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def _numbered(directory: Path) -> Iterator[tuple[Path, int]]:
    """The files in the directory that are named like those that a save makes, and their generations."""
    for file in sorted(directory.iterdir()):
        match = DATA_FILE.fullmatch(file.name) or DRAFT.fullmatch(file.name)
        if match:
            yield file, int(match.group(1))


def _file_name(name: str, generation: int, taken: Collection[str]) -> str:
    """A name that every file system knows from the ``taken`` ones, whatever it makes of capitals and accents."""
    plain = re.sub(r"[^a-z0-9_.]", "_", name.lower())[:80]
    file = f"{plain}-{generation}.safetensors"
    return file if file not in taken else f"{plain}.{len(taken)}-{generation}.safetensors"


class _Writer:
    """Writes tensors to files, durably, in threads of its own: they copy, hash and write, and one syncs."""

    def __enter__(self) -> _Writer:
        self._entries: list[Entry] = []
        self._syncs: list[Future[None]] = []  # of large files, under way
        with ExitStack() as held:
            self._files = held.enter_context(ExitStack())  # closed once no thread needs them any more
            self._threads = held.enter_context(Threads(THREADS))
            self._syncing = held.enter_context(Threads(1))
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    def write(self, file: Path, name: str, tensor: Tensor) -> None:
        """Make a file; of a large one the disk still has to write when this returns."""
        entry = Entry(name, file.name, tensor.dtype, tuple(tensor.shape), "")
        if not is_name(name) or tensor.dtype not in DTYPES:
            raise ArgumentError(
                f"tensors: expected a plain name and one of {list(DTYPES)}, got {name!r}, {tensor.dtype}"
            )
        flat, first, width = tensor.detach().reshape(-1), len(entry.header), tensor.dtype.itemsize
        with ExitStack() as opened:
            out = opened.enter_context(open(file, "xb", buffering=0))
            sizes = Sizes.usual()
            digest, step, synced = Digest(self._threads), max(1, sizes.chunk // width), 0
            _write_all(out.fileno(), entry.header, 0)
            digest.add(len(entry.header), hash_of, entry.header)
            for start in range(0, len(flat), step):
                chunk = bytes_of(flat[start : start + step].cpu())
                digest.add(len(chunk), _write_and_hash, out.fileno(), chunk, first + start * width)
                if start * width - synced >= sizes.sync:
                    self._syncs.append(self._syncing.submit(os.fsync, out.fileno()))
                    synced = start * width
            self._entries.append(entry._replace(blake2b=digest.hexdigest()))
            if synced:
                self._syncs.append(self._syncing.submit(os.fsync, out.fileno()))
                self._files.enter_context(opened.pop_all())
            else:
                os.fsync(out.fileno())

    def finish(self) -> list[Entry]:
        """What was written, once all of it is durable."""
        for sync in self._syncs:
            sync.result()
        return self._entries


def _write_and_hash(descriptor: int, chunk: memoryview, start: int) -> bytes:
    """Write a chunk to its place in a file; its hash."""
    size = Sizes.usual().part
    digest, copy = hashlib.blake2b(), memoryview(bytearray(min(size, len(chunk))))
    for place in range(0, len(chunk), size):
        part = copy[: len(chunk) - place]
        part[:] = chunk[place : place + size]  # what is written is what is hashed, whoever may write to it meanwhile
        digest.update(part)
        _write_all(descriptor, part, start + place)
    return digest.digest()


def _write_bytes(file: Path, content: bytes) -> None:
    with open(file, "xb", buffering=0) as out:
        _write_all(out.fileno(), content, 0)
        os.fsync(out.fileno())


def _write_all(descriptor: int, content: memoryview | bytes, start: int) -> None:
    left = memoryview(content)
    while len(left):
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written


def _manifest(entries: list[Entry], description: Mapping[str, Any]) -> bytes:
    body = {
        "format": FORMAT,
        "description": dict(description),
        "tensors": [
            {
                "name": entry.name,
                "file": entry.file,
                "dtype": DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "blake2b": entry.blake2b,
            }
            for entry in entries
        ],
    }
    text = json.dumps(body, indent=1, allow_nan=False)
    digest = hashlib.blake2b(text.encode()).hexdigest()
    return f'{{"blake2b": "{digest}", "snapshot":\n{text}\n}}\n'.encode()
