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

A file's hash is the blake2b of those of its header and of each 8 MiB of what follows, so that these are taken side by
side, and while other bytes are written or read.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import math
import mmap
import os
import re
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdb.errors import (
    ArgumentError,
    CorruptSnapshotError,
    DtypeError,
    LockedError,
    UnsupportedSystemError,
    check_real,
    describe,
)
from softdb.locks import run_in_forked_children

__all__ = [
    "FORMAT",
    "Examination",
    "FileState",
    "examine_snapshot",
    "locked",
    "read_snapshot",
    "write_snapshot",
]

FORMAT = 1
MANIFEST, LOCK = "manifest.json", ".lock"
# A manifest describes some dozen tensors.
LARGEST_MANIFEST = 2**20
# As many bytes are hashed at a time: part of the format.
CHUNK = 2**23
# So many threads write and hash, or read and hash; and so many chunks wait for one, or are under way, at the most.
THREADS = min(4, os.cpu_count() or 1)
WAITING = THREADS + 2
# Of errors when a file is opened, those that tell of another kind of file than a save makes, or of none.
DAMAGE = (
    errno.ENOENT,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENAMETOOLONG,
)
# As many bytes at a time, so that they are still in the processor's cache when they are hashed, or written.
PART = 2**18
# The disk is told to write after so many bytes: it has something to do while more are hashed.
SYNC = 2**26
# Where the numbers in a file begin: at a multiple of so many bytes.
ALIGNMENT = 64
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
DATA_FILE = re.compile(r"[a-z_][a-z0-9_.]*-([0-9]{1,18})\.safetensors")
DRAFT = re.compile(re.escape(MANIFEST) + r"-([0-9]{1,18})")
LARGEST = 10**18 - 1  # generation that these names have room for
# Without any one of these, a snapshot is not durable, or links are followed, or threads share a place in a file.
POSIX = ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "preadv", "pwrite")


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
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def _is_name(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


class _Threads(ThreadPoolExecutor):
    """Does at once what it is given where no thread is to be had: there are too many, or Python is about to end."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As that of any executor."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            return _at_once(fn, *args, **kwargs)


def _at_once(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    done: Future[Any] = Future()
    try:
        done.set_result(fn(*args, **kwargs))
    except Exception as error:
        done.set_exception(error)
    return done


class _Digest:
    """The hash of a file, of those of its chunks."""

    def __init__(self, threads: _Threads) -> None:
        self._threads = threads
        self._waiting: deque[Future[bytes]] = deque()
        self._whole = hashlib.blake2b()

    def add(self, size: int, hashed: Callable[..., bytes], *arguments: Any) -> None:
        """Add the chunk of ``size`` bytes whose hash ``hashed`` makes; waits where many are under way."""
        do = self._threads.submit if size > PART else _at_once  # to start a thread would take longer
        self._waiting.append(do(hashed, *arguments))
        if len(self._waiting) > WAITING:
            self._whole.update(self._waiting.popleft().result())

    def hexdigest(self) -> str:
        """The hash, once all chunks are in."""
        while self._waiting:
            self._whole.update(self._waiting.popleft().result())
        return self._whole.hexdigest()


def _hashed(content: memoryview | bytes) -> bytes:
    return hashlib.blake2b(content).digest()


# -- writing ---------------------------------------------------------------------------------------------


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
        if len(manifest) > LARGEST_MANIFEST:
            raise ArgumentError(
                f"tensors: expected what a manifest of {LARGEST_MANIFEST} bytes has room for, got {len(tensors)}"
            )
        _write_bytes(draft, manifest)
        _sync(directory)
        swapping = True
        os.replace(draft, directory / MANIFEST)
    except BaseException:
        # An interrupt, or a disk far away, may report an error after the manifest has been swapped.
        for file in written if not swapping or os.path.exists(draft) else []:
            with suppress(OSError):
                file.unlink()
        raise
    _sync(directory)
    kept = {entry.file for entry in entries}
    with _Threads(THREADS) as threads:  # it takes the system a tenth of a second for a gigabyte
        for file in [file for file, _ in _numbered(directory) if file.name not in kept]:
            threads.submit(file.unlink)  # what cannot be removed is left to the next save


def _make_room(files: Iterable[Path]) -> None:
    """Let new files have the memory that the system keeps what is in these in: they are about to go."""
    for file in files:
        with suppress(OSError, AttributeError):  # it is advice, which not every system takes
            if file.lstat().st_size > SYNC:
                descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def _directory(path: str | os.PathLike[str]) -> Path:
    missing = [f"os.{name}" for name in POSIX if not hasattr(os, name)]
    missing += [] if importlib.util.find_spec("fcntl") else ["fcntl"]
    if missing:
        raise UnsupportedSystemError(
            f"path: expected a system with POSIX files and locks, got {sys.platform} without {', '.join(missing)}; "
            "keep the rows with torch.save(store.state_dict(), file)"
        )
    try:
        directory = Path(path)
    except TypeError as error:
        raise DtypeError(f"path: expected a str or a pathlib.Path, got {describe(path)}") from error
    if "\0" in str(directory):
        raise ArgumentError(f"path: expected a path, got {str(directory)!r}, with a null character in it")
    return directory


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
        self._entries: list[_Entry] = []
        self._syncs: list[Future[None]] = []  # of large files, under way
        with ExitStack() as held:
            self._files = held.enter_context(ExitStack())  # closed once no thread needs them any more
            self._threads = held.enter_context(_Threads(THREADS))
            self._syncing = held.enter_context(_Threads(1))
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    def write(self, file: Path, name: str, tensor: Tensor) -> None:
        """Make a file; of a large one the disk still has to write when this returns."""
        entry = _Entry(name, file.name, tensor.dtype, tuple(tensor.shape), "")
        if not _is_name(name) or tensor.dtype not in DTYPES:
            raise ArgumentError(
                f"tensors: expected a plain name and one of {list(DTYPES)}, got {name!r}, {tensor.dtype}"
            )
        flat, first, width = tensor.detach().reshape(-1), len(entry.header), tensor.dtype.itemsize
        with ExitStack() as opened:
            out = opened.enter_context(open(file, "xb", buffering=0))
            digest, step, synced = _Digest(self._threads), max(1, CHUNK // width), 0
            _write_all(out.fileno(), entry.header, 0)
            digest.add(len(entry.header), _hashed, entry.header)
            for start in range(0, len(flat), step):
                chunk = _bytes_of(flat[start : start + step].cpu())
                digest.add(len(chunk), _write_and_hash, out.fileno(), chunk, first + start * width)
                if start * width - synced >= SYNC:
                    self._syncs.append(self._syncing.submit(os.fsync, out.fileno()))
                    synced = start * width
            self._entries.append(entry._replace(blake2b=digest.hexdigest()))
            if synced:
                self._syncs.append(self._syncing.submit(os.fsync, out.fileno()))
                self._files.enter_context(opened.pop_all())
            else:
                os.fsync(out.fileno())

    def finish(self) -> list[_Entry]:
        """What was written, once all of it is durable."""
        for sync in self._syncs:
            sync.result()
        return self._entries


def _write_and_hash(descriptor: int, chunk: memoryview, start: int) -> bytes:
    """Write a chunk to its place in a file; its hash."""
    digest, copy = hashlib.blake2b(), memoryview(bytearray(min(PART, len(chunk))))
    for place in range(0, len(chunk), PART):
        part = copy[: len(chunk) - place]
        part[:] = chunk[place : place + PART]  # what is written is what is hashed, whoever may write to it meanwhile
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
def locked(path: str | os.PathLike[str], timeout: float) -> Iterator[Path]:
    """Make the directory ``path``, if need be, and let nobody else save to it; the system lets go if the process ends.

    Args:
        path: The directory; made if it does not exist, not its parents.
        timeout: How many seconds to wait while somebody else saves.

    Raises:
        LockedError: Somebody else was saving for longer than that.
        OSError: The directory cannot be made, or looked at.
        ArgumentError, DtypeError: An argument is not as above.
    """
    patience = check_real("timeout", timeout)
    if not patience >= 0:
        raise ArgumentError(f"timeout: expected a number of seconds of at least 0, got {timeout}")
    directory = _directory(path)
    directory.mkdir(exist_ok=True)  # somebody else may make it at the same time
    if not (directory / MANIFEST).exists():
        # Nor is it known whether who made it has made its name durable; where we may not look, it is his to do.
        with suppress(PermissionError):
            _sync(directory.parent)
    with _held(directory, patience):
        yield directory


@contextmanager
def _held(directory: Path, timeout: float) -> Iterator[None]:
    """Hold the directory's lock."""
    import fcntl  # which Windows does not have

    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    _lock_files.add(descriptor)
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
        try:
            yield
        finally:
            # Closing would not release it while a child that was just forked has not closed its copy yet.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        _lock_files.discard(descriptor)
        os.close(descriptor)


# A child that is forked meanwhile would hold the lock, too, for as long as it lives.
_lock_files: set[int] = set()


def _after_fork() -> None:
    while _lock_files:
        os.close(_lock_files.pop())


run_in_forked_children(_after_fork)


# -- reading ---------------------------------------------------------------------------------------------


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
    directory, tensors = _directory(path), {}
    with ExitStack() as files:
        entries, description, sources = _open_all(directory, files)
        threads = files.enter_context(_Threads(THREADS))
        for entry, source in zip(entries, sources, strict=True):
            file = directory / entry.file
            _check_size_and_header(file, entry, source)
            if entry.name not in mapped:
                tensors[entry.name] = _room_for(file, entry)
                _check_hash(file, entry, source, threads, _bytes_of(tensors[entry.name].reshape(-1)))
            else:
                if verify:
                    _check_hash(file, entry, source, threads)
                tensors[entry.name] = _mapped(entry, source)
    return tensors, description


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
    directory = _directory(path)
    present = [] if directory.is_file() else sorted(file.name for file in directory.iterdir())
    try:
        entries, description = _read_manifest(directory / MANIFEST)
    except CorruptSnapshotError as error:
        return Examination(None, str(error), [], [name for name in present if name not in (MANIFEST, LOCK)])
    total = sum(len(entry.header) + entry.nbytes for entry in entries)
    done, states = 0, []
    with _Threads(THREADS) as threads:
        for entry in entries:
            file, problem = directory / entry.file, None

            def report(count: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + count, total)

            try:
                with _open(file) as source:
                    _check_size_and_header(file, entry, source)
                    _check_hash(file, entry, source, threads, report=report)
            except CorruptSnapshotError as error:
                problem = str(error)
            done += len(entry.header) + entry.nbytes
            report(0, done)
            states.append(FileState(entry.file, entry.name, entry.dtype, entry.shape, entry.nbytes, problem))
    if any(state.problem for state in states) and _is_replaced(directory, entries):
        return examine_snapshot(path, progress=progress)
    known = {MANIFEST, LOCK, *(entry.file for entry in entries)}
    return Examination(description, None, states, [name for name in present if name not in known])


def _open_all(directory: Path, files: ExitStack) -> tuple[list[_Entry], dict[str, Any], list[Any]]:
    """What the manifest says, and the files that it names: while they are open, nobody can take them away."""
    while True:
        entries, description = _read_manifest(directory / MANIFEST)
        with ExitStack() as opened:
            try:
                sources = [opened.enter_context(_open(directory / entry.file)) for entry in entries]
            except CorruptSnapshotError:
                if not _is_replaced(directory, entries):
                    raise
                continue
            files.enter_context(opened.pop_all())
            return entries, description, sources


def _is_replaced(directory: Path, entries: list[_Entry]) -> bool:
    """Whether somebody has saved since the manifest listed these."""
    return _read_manifest(directory / MANIFEST)[0] != entries


def _open(file: Path) -> Any:
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
    if not isinstance(name, str) or not _is_name(name):
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
    return _Entry(name, file, DTYPE_OF[dtype], tuple(shape), digest)


def _check_size_and_header(file: Path, entry: _Entry, source: Any) -> None:
    size, wanted = os.fstat(source.fileno()).st_size, len(entry.header) + entry.nbytes
    if size != wanted:
        raise CorruptSnapshotError(f"{file}: expected {wanted} bytes for the tensor {entry.name!r}, got {size}")
    if source.read(len(entry.header)) != entry.header:
        raise CorruptSnapshotError(f"{file}: expected the header of the tensor {entry.name!r}, got another")


def _check_hash(
    file: Path,
    entry: _Entry,
    source: Any,
    threads: _Threads,
    into: memoryview | None = None,
    *,
    report: Callable[[int], None] | None = None,
) -> None:
    """Compare a file's hash with the manifest's, and read the tensor ``into`` memory on the way."""
    first = len(entry.header)

    def read(start: int) -> bytes:
        digest, size = hashlib.blake2b(), min(CHUNK, entry.nbytes - start)
        buffer = memoryview(bytearray(min(PART, size))) if into is None else into[start : start + size]
        for place in range(0, size, PART):
            part = buffer[: size - place] if into is None else buffer[place : place + PART]
            if not _fill(source.fileno(), part, first + start + place):
                raise CorruptSnapshotError(f"{file}: the tensor {entry.name!r} was cut while it was read")
            digest.update(part)
        return digest.digest()

    digest = _Digest(threads)
    digest.add(len(entry.header), _hashed, entry.header)
    for start in range(0, entry.nbytes, CHUNK):
        digest.add(min(CHUNK, entry.nbytes - start), read, start)
        if report is not None:
            report(start)
    if digest.hexdigest() != entry.blake2b:
        raise CorruptSnapshotError(
            f"{file}: expected the tensor {entry.name!r} as saved, got other bytes: its hash differs"
        )


def _fill(descriptor: int, place: memoryview, start: int) -> bool:
    while len(place):
        count = os.preadv(descriptor, [place], start)
        if not count:
            return False
        place, start = place[count:], start + count
    return True


def _room_for(file: Path, entry: _Entry) -> Tensor:
    try:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    except RuntimeError as error:  # torch's for no memory
        raise MemoryError(
            f"{file}: there is no memory for the {entry.nbytes} bytes of the tensor {entry.name!r}; load(mmap=True) "
            "leaves keys and values where they are"
        ) from error


def _mapped(entry: _Entry, source: Any) -> Tensor:
    """The tensor where it lies in its file; pages that are written to become the process's own."""
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    # Nobody is to set memory aside for pages that will not be written to: there may be more of them than memory.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    size = len(entry.header) + entry.nbytes
    memory = mmap.mmap(source.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    flat = torch.frombuffer(memory, dtype=entry.dtype, count=math.prod(entry.shape), offset=len(entry.header))
    return flat.view(entry.shape)
