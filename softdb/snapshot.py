"""Named tensors and a JSON description, as one directory that always holds a whole snapshot.

::

    path/manifest.json             which files make the snapshot, their sizes and hashes, and the description
    path/keys-7.safetensors        one tensor each, of generation 7
    path/.lock                     held while somebody saves

Data files carry the generation in their name and are never written to again. A save writes new ones, makes them
durable, and then swaps the manifest alone, by a rename: whoever opens the path finds the old snapshot or the new one,
whole. What a crash left over belongs to no manifest, and the next save removes it.

Reading trusts nothing: a file's header has to be, byte for byte, the one that the manifest describes, sizes are
compared with the file's before memory is taken, names lead nowhere but into the directory, and links are not followed.
There is nothing in a snapshot that could be executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdb.errors import ArgumentError, CorruptSnapshotError, LockedError

__all__ = ["FORMAT", "read_snapshot", "write_snapshot"]

FORMAT = 1
MANIFEST, LOCK = "manifest.json", ".lock"
# A manifest describes some dozen tensors.
LARGEST_MANIFEST = 2**20
# As many bytes are written, or read, while as many are hashed.
CHUNK = 2**23
# How often somebody who waits for a lock looks again.
PATIENCE = 0.02
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
DATA_FILE = re.compile(r"[a-z][a-z0-9_.]*-([0-9]{1,18})\.safetensors")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")


class _Entry(NamedTuple):
    """One tensor of a snapshot, as the manifest describes it."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blake2b: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def header(self) -> bytes:
        """What the file begins with, in the safetensors format."""
        described = {"dtype": DTYPES[self.dtype], "shape": list(self.shape), "data_offsets": [0, self.nbytes]}
        text = json.dumps({self.name: described}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


# -- writing ---------------------------------------------------------------------------------------------


def write_snapshot(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    timeout: float = 0.0,
) -> None:
    """Make the directory ``path`` hold these tensors and this description, durably, or leave it as it was.

    Args:
        path: The directory; made if it does not exist, not its parents.
        tensors: By name.
        description: What JSON can hold.
        timeout: How many seconds to wait while somebody else saves.

    Raises:
        LockedError: Somebody else was saving for longer than that.
        OSError: The system refuses; the snapshot that was there is intact.
    """
    directory = Path(path)
    if not directory.exists():
        directory.mkdir()
        _sync(directory.parent)
    with _locked(directory, timeout):
        generation = 1 + max((number for _, number in _data_files(directory)), default=0)
        written: list[Path] = []
        try:
            entries = []
            for name, tensor in tensors.items():
                file = directory / f"{name.lower()}-{generation}.safetensors"
                written.append(file)
                entries.append(_write_tensor(file, name, tensor))
            draft = directory / f"{MANIFEST}-{generation}"
            written.append(draft)
            _write_bytes(draft, _manifest(entries, description))
            _sync(directory)
            os.replace(draft, directory / MANIFEST)
        except BaseException:
            for file in written:
                with suppress(OSError):
                    file.unlink()
            raise
        _sync(directory)
        kept = {entry.file for entry in entries}
        leftovers = [file for file, _ in _data_files(directory) if file.name not in kept]
        for file in [*leftovers, *directory.glob(f"{MANIFEST}-*")]:
            with suppress(OSError):
                file.unlink()


def _data_files(directory: Path) -> Iterator[tuple[Path, int]]:
    """The files in the directory that are named like a snapshot's, and their generations."""
    for file in sorted(directory.iterdir()):
        match = DATA_FILE.fullmatch(file.name)
        if match:
            yield file, int(match.group(1))


def _write_tensor(file: Path, name: str, tensor: Tensor) -> _Entry:
    entry = _Entry(name, file.name, tensor.dtype, tuple(tensor.shape), "")
    if not NAME.fullmatch(name) or tensor.dtype not in DTYPES:
        raise ArgumentError(f"tensors: expected a plain name and one of {list(DTYPES)}, got {name!r}, {tensor.dtype}")
    digest = hashlib.blake2b(entry.header)
    flat = tensor.detach().reshape(-1)
    step = max(1, CHUNK // tensor.dtype.itemsize)
    with open(file, "xb", buffering=0) as out, ThreadPoolExecutor(1) as aside:
        _write_all(out, memoryview(entry.header))
        for start in range(0, len(flat), step):
            part = _bytes_of(flat[start : start + step].cpu())
            hashed = aside.submit(digest.update, part)
            _write_all(out, part)
            hashed.result()
        os.fsync(out.fileno())
    return entry._replace(blake2b=digest.hexdigest())


def _write_bytes(file: Path, content: bytes) -> None:
    with open(file, "xb", buffering=0) as out:
        _write_all(out, memoryview(content))
        os.fsync(out.fileno())


def _write_all(out: Any, content: memoryview) -> None:
    while len(content):
        content = content[out.write(content) :]


def _manifest(entries: list[_Entry], description: Mapping[str, Any]) -> bytes:
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


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a vector on the CPU."""
    numbers: Any = flat.contiguous().view(torch.uint8).numpy()
    return memoryview(numbers) if len(flat) else memoryview(b"")


def _sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(directory: Path, timeout: float) -> Iterator[None]:
    """Hold the directory's lock; the system frees it if the process ends."""
    import fcntl  # which Windows does not have

    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockedError(
                        f"path: expected nobody else to save to {directory}, but somebody does; wait with timeout=..."
                    ) from None
                time.sleep(PATIENCE)
        yield
    finally:
        os.close(descriptor)


# -- reading ---------------------------------------------------------------------------------------------


def read_snapshot(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description in the directory ``path``, every byte compared with its hash.

    Raises:
        FileNotFoundError: There is no snapshot.
        CorruptSnapshotError: A file is not what it was when it was saved; it names the file and the tensor.
        ArgumentError: The snapshot was made by a newer softdb.
    """
    directory = Path(path)
    entries, description = _read_manifest(directory / MANIFEST)
    return {entry.name: _read_tensor(directory, entry) for entry in entries}, description


def _open(file: Path) -> Any:
    """A regular file, for reading; links are not followed."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and file.name == MANIFEST:
            raise
        raise CorruptSnapshotError(f"{file}: expected a file of the snapshot, got: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptSnapshotError(f"{file}: expected a regular file, got something else")
    return os.fdopen(descriptor, "rb", buffering=0)


def _read_manifest(file: Path) -> tuple[list[_Entry], dict[str, Any]]:
    with _open(file) as source:
        size = os.fstat(source.fileno()).st_size
        if size > LARGEST_MANIFEST:
            raise CorruptSnapshotError(f"{file}: expected at most {LARGEST_MANIFEST} bytes, got {size}")
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


def _entry(found: Any) -> _Entry:
    name, file, dtype, shape, digest = (found[key] for key in ("name", "file", "dtype", "shape", "blake2b"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"the name {name!r}")
    if not isinstance(file, str) or not DATA_FILE.fullmatch(file):
        raise ValueError(f"the file name {file!r}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"the shape {shape!r}")
    if not isinstance(digest, str):
        raise ValueError("no hash")
    return _Entry(name, file, DTYPE_OF[dtype], tuple(shape), digest)


def _read_tensor(directory: Path, entry: _Entry) -> Tensor:
    file = directory / entry.file
    with _open(file) as source, ThreadPoolExecutor(1) as aside:
        size, wanted = os.fstat(source.fileno()).st_size, len(entry.header) + entry.nbytes
        if size != wanted:
            raise CorruptSnapshotError(f"{file}: expected {wanted} bytes for the tensor {entry.name!r}, got {size}")
        if source.read(len(entry.header)) != entry.header:
            raise CorruptSnapshotError(f"{file}: expected the header of the tensor {entry.name!r}, got another")
        digest = hashlib.blake2b(entry.header)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        flat = _bytes_of(tensor.reshape(-1))
        hashed = aside.submit(digest.update, b"")
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            if not _fill(source, part):
                raise CorruptSnapshotError(f"{file}: expected {wanted} bytes for the tensor {entry.name!r}, got fewer")
            hashed.result()
            hashed = aside.submit(digest.update, part)
        hashed.result()
    if digest.hexdigest() != entry.blake2b:
        raise CorruptSnapshotError(
            f"{file}: expected the tensor {entry.name!r} as saved, got other bytes: its hash differs"
        )
    return tensor


def _fill(source: Any, part: memoryview) -> bool:
    while len(part):
        count = source.readinto(part)
        if not count:
            return False
        part = part[count:]
    return True
