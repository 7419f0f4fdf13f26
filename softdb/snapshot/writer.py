"""Writer of snapshots: data files first, then the manifest that names them."""

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
    DATA_FILE_PATTERN,
    DRAFT_PATTERN,
    DTYPE_NAMES,
    FORMAT,
    MANIFEST,
    Entry,
    Sizes,
    is_name,
    view_bytes,
)
from softdb.snapshot.hashing import MAX_THREADS, FileHash, ThreadPool, compute_hash
from softdb.snapshot.lock import sync_directory

__all__ = ["write_snapshot"]

MAX_GENERATION = 10**18 - 1  # file names have at most 18 digits


def write_snapshot(directory: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and a description to a directory, atomically and durably.

    If the write fails, the directory still holds its previous snapshot. Call this function within `lock_directory`.

    Args:
        directory: Directory that `lock_directory` has locked.
        tensors: Tensors by name.
        description: Description that JSON can represent.

    Raises:
        OSError: The system reports an error. The previous snapshot is unchanged.
        ArgumentError: There are more tensors than a manifest can describe, or a dtype is not supported.
    """
    is_replacing = False
    generations = (number for _, number in _list_numbered_files(directory))
    generation = 1 + max((number for number in generations if number < MAX_GENERATION), default=0)
    written: list[Path] = []
    _drop_page_cache(file for file, _ in _list_numbered_files(directory))
    try:
        with _TensorWriter() as writer:
            for name, tensor in tensors.items():
                file = directory / _make_file_name(name, generation, {file.name for file in written})
                written.append(file)
                writer.write(file, name, tensor)
            entries = writer.finish()
        draft = directory / f"{MANIFEST}-{generation}"
        written.append(draft)
        manifest = _encode_manifest(entries, description)
        most = Sizes.default().manifest
        if len(manifest) > most:
            raise ArgumentError(f"tensors: expected a manifest of at most {most} bytes, got {len(manifest)}")
        _write_bytes(draft, manifest)
        sync_directory(directory)
        is_replacing = True
        os.replace(draft, directory / MANIFEST)
    except BaseException:
        # An interrupt or a network file system may raise after the manifest was replaced.
        for file in written if not is_replacing or os.path.exists(draft) else []:
            with suppress(OSError):
                file.unlink()
        raise
    sync_directory(directory)
    kept = {entry.file for entry in entries}
    with ThreadPool(MAX_THREADS) as threads:  # removing 1 GB takes the system about 0.1 s
        for file in [file for file, _ in _list_numbered_files(directory) if file.name not in kept]:
            threads.submit(file.unlink)  # the next save retries


def _drop_page_cache(files: Iterable[Path]) -> None:
    """Remove files from the page cache, so that new files find room in it."""
    for file in files:
        with suppress(OSError, AttributeError):  # not every system supports this advice
            if file.lstat().st_size > Sizes.default().sync:
                descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def _list_numbered_files(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files that are named like those of a save, and their generations."""
    for file in sorted(directory.iterdir()):
        match = DATA_FILE_PATTERN.fullmatch(file.name) or DRAFT_PATTERN.fullmatch(file.name)
        if match:
            yield file, int(match.group(1))


def _make_file_name(name: str, generation: int, taken: Collection[str]) -> str:
    """Return a file name that is not in ``taken``.

    It consists of lower-case ASCII characters, so that file systems which ignore case or accents distinguish it, too.
    """
    stem = re.sub(r"[^a-z0-9_.]", "_", name.lower())[:80]
    file = f"{stem}-{generation}.safetensors"
    return file if file not in taken else f"{stem}.{len(taken)}-{generation}.safetensors"


class _TensorWriter:
    """Writer of tensors to files; several threads write, and one thread syncs."""

    def __enter__(self) -> _TensorWriter:
        self._entries: list[Entry] = []
        self._syncs: list[Future[None]] = []  # pending syncs of large files
        with ExitStack() as held:
            self._files = held.enter_context(ExitStack())  # closed after the threads have ended
            self._threads = held.enter_context(ThreadPool(MAX_THREADS))
            self._syncing = held.enter_context(ThreadPool(1))
            self._hold_lock = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hold_lock.close()

    def write(self, file: Path, name: str, tensor: Tensor) -> None:
        """Write a tensor to a file; a large file may not be synced yet on return."""
        entry = Entry(name, file.name, tensor.dtype, tuple(tensor.shape), "")
        if not is_name(name) or tensor.dtype not in DTYPE_NAMES:
            raise ArgumentError(
                f"tensors: expected a dotted name and one of {list(DTYPE_NAMES)}, got {name!r}, {tensor.dtype}"
            )
        flat, first, width = tensor.detach().reshape(-1), len(entry.header), tensor.dtype.itemsize
        with ExitStack() as opened:
            out = opened.enter_context(open(file, "xb", buffering=0))
            sizes = Sizes.default()
            digest, step, synced = FileHash(self._threads), max(1, sizes.chunk // width), 0
            _write_all(out.fileno(), entry.header, 0)
            digest.add(len(entry.header), compute_hash, entry.header)
            for start in range(0, len(flat), step):
                chunk = view_bytes(flat[start : start + step].cpu())
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
        """Wait until all files are synced; return their entries."""
        for sync in self._syncs:
            sync.result()
        return self._entries


def _write_and_hash(descriptor: int, chunk: memoryview, start: int) -> bytes:
    """Write a chunk to its place in a file; return its hash."""
    size = Sizes.default().part
    digest, copy = hashlib.blake2b(), memoryview(bytearray(min(size, len(chunk))))
    for place in range(0, len(chunk), size):
        part = copy[: len(chunk) - place]
        # Hash and write the same bytes, even if another thread writes to the tensor.
        part[:] = chunk[place : place + size]
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


def _encode_manifest(entries: list[Entry], description: Mapping[str, Any]) -> bytes:
    body = {
        "format": FORMAT,
        "description": dict(description),
        "tensors": [
            {
                "name": entry.name,
                "file": entry.file,
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "blake2b": entry.blake2b,
            }
            for entry in entries
        ],
    }
    text = json.dumps(body, indent=1, allow_nan=False)
    digest = hashlib.blake2b(text.encode()).hexdigest()
    return f'{{"blake2b": "{digest}", "snapshot":\n{text}\n}}\n'.encode()
