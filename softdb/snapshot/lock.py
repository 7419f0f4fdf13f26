"""Directory of a snapshot, and the lock that a save holds on it."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softdb._checks import check_real, describe
from softdb.errors import ArgumentError, DtypeError, LockedError, UnsupportedSystemError
from softdb.processes import run_in_forked_children
from softdb.snapshot.format import LOCK_FILE, MANIFEST

__all__ = ["lock_directory", "resolve_directory", "sync_directory"]

# Seconds between two attempts to acquire a lock.
LOCK_POLL_SECONDS = 0.02


# Without these functions and flags, a snapshot would not be durable, links would be followed, or threads would share a
# file position.
REQUIRED_OS_NAMES = ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "preadv", "pwrite")


def resolve_directory(path: str | os.PathLike[str]) -> Path:
    """Return the path of a snapshot; raise on systems without POSIX files and locks."""
    missing = [f"os.{name}" for name in REQUIRED_OS_NAMES if not hasattr(os, name)]
    missing += [] if importlib.util.find_spec("fcntl") else ["fcntl"]
    if missing:
        raise UnsupportedSystemError(
            f"path: expected a system with POSIX files and locks, got {sys.platform} without {', '.join(missing)}; "
            "save the rows with torch.save(store.state_dict(), file)"
        )
    try:
        directory = Path(path)
    except TypeError as error:
        raise DtypeError(f"path: expected a str or a pathlib.Path, got {describe(path)}") from error
    if "\0" in str(directory):
        raise ArgumentError(f"path: expected a path, got {str(directory)!r}, which contains a null character")
    return directory


def sync_directory(directory: Path) -> None:
    """Flush the file names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_directory(path: str | os.PathLike[str], timeout: float) -> Iterator[Path]:
    """Create the directory ``path`` if needed, and lock it against other saves.

    The operating system releases the lock if the process ends.

    Args:
        path: Directory. It is created if it does not exist; its parents are not.
        timeout: Seconds to wait while another save is in progress.

    Raises:
        LockedError: Another save did not finish within ``timeout``.
        OSError: The directory cannot be created or read.
        ArgumentError: ``timeout`` is negative or NaN, or ``path`` is no valid path.
        DtypeError: An argument has the wrong type.
    """
    seconds = check_real("timeout", timeout)
    if not seconds >= 0:
        raise ArgumentError(f"timeout: expected a number of seconds of at least 0, got {timeout}")
    directory = resolve_directory(path)
    directory.mkdir(exist_ok=True)  # Another process may create it at the same time.
    if not (directory / MANIFEST).exists():
        # The process that created the directory may not have synced its name to the disk. Without permission to read
        # the parent directory, this process cannot sync it.
        with suppress(PermissionError):
            sync_directory(directory.parent)
    with _hold_lock(directory, seconds):
        yield directory


@contextmanager
def _hold_lock(directory: Path, timeout: float) -> Iterator[None]:
    """Hold the lock of the directory."""
    import fcntl  # not available on Windows

    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    _lock_descriptors.add(descriptor)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockedError(
                        f"path: {directory} is locked by another save; pass timeout=... to wait"
                    ) from None
                time.sleep(LOCK_POLL_SECONDS)
        try:
            yield
        finally:
            # Closing the file would not release the lock while a forked child still holds a copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        _lock_descriptors.discard(descriptor)
        os.close(descriptor)


# Descriptors of locked files. A forked child must close them, or it would hold the locks as long as it lives.
_lock_descriptors: set[int] = set()


def _close_lock_files() -> None:
    while _lock_descriptors:
        os.close(_lock_descriptors.pop())


run_in_forked_children(_close_lock_files)
