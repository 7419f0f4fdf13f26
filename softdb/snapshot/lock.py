"""The directory of a snapshot, and the lock of whoever saves to it."""

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
from softdb.snapshot.format import LOCK, MANIFEST

__all__ = ["directory_of", "locked", "sync_directory"]

# How often somebody who waits for a lock looks again.
PATIENCE = 0.02


# Without any one of these, a snapshot is not durable, or links are followed, or threads share a place in a file.
POSIX = ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "preadv", "pwrite")


def directory_of(path: str | os.PathLike[str]) -> Path:
    """Return a snapshot's path, on systems that have what snapshots need."""
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


def sync_directory(directory: Path) -> None:
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
    directory = directory_of(path)
    directory.mkdir(exist_ok=True)  # somebody else may make it at the same time
    if not (directory / MANIFEST).exists():
        # Nor is it known whether who made it has made its name durable; where we may not look, it is his to do.
        with suppress(PermissionError):
            sync_directory(directory.parent)
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
