"""Shared lock of a table: many readers or one writer.

Each reader thread has its own lock, so that readers do not contend; a writer acquires the locks of all readers. The
locks are reentrant locks of Python, acquired only by ``with``. When an interrupt occurs, each lock is therefore either
free, or held by a ``with`` block that releases it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from softdb.processes import run_in_forked_children

__all__ = ["SharedLock"]


class SharedLock:
    """Reentrant readers-writer lock.

    Reading and writing may be nested in either order. A reader that starts to write waits for the other readers and for
    the present writer. Two readers that start to write at the same time deadlock.

    Attributes:
        counter_lock: Exclusive lock for the counters that readers write.
    """

    def __init__(self) -> None:
        self._initialize()
        _shared_locks.add(self)

    def _initialize(self) -> None:
        self._own = threading.local()
        self._gate: Any = threading.RLock()  # Held by the writer; readers acquire it before they start.
        self._all: weakref.WeakSet[Any] = weakref.WeakSet()  # The locks of all live threads.
        self.counter_lock = threading.RLock()  # Reentrant: a signal handler may save while its thread holds it.

    @property
    def is_read(self) -> bool:
        """Whether this thread holds the lock for reading or writing."""
        return bool(self._lock_of_this_thread()._is_owned())

    @property
    def is_written(self) -> bool:
        """Whether this thread holds the lock for writing."""
        return bool(self._gate._is_owned())

    def reading(self) -> Any:
        """Return a context manager that holds the lock for reading."""
        lock = self._lock_of_this_thread()
        if not lock._is_owned():
            with self._gate:  # New readers wait for a waiting writer, so that it is not starved.
                pass
        return lock

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock for writing."""
        if self._gate._is_owned():
            yield
            return
        own = self._lock_of_this_thread()
        with self._gate, own:
            others = [lock for lock in self._all if lock is not own]
            if not others:
                yield
                return
            with _all_of(others):
                yield

    def _lock_of_this_thread(self) -> Any:
        lock = getattr(self._own, "lock", None)
        if lock is None:
            lock = threading.RLock()
            with self._gate:
                self._all.add(lock)
            self._own.lock = lock
        return lock

    def __reduce__(self) -> Any:
        return SharedLock, ()  # A copy is unlocked.

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedLock:
        return SharedLock()


@contextmanager
def _all_of(locks: Sequence[Any]) -> Iterator[None]:
    middle = len(locks) // 2
    if middle == 0:
        with locks[0]:
            yield
    else:  # Nesting by halves keeps the recursion depth logarithmic in the number of threads.
        with _all_of(locks[:middle]), _all_of(locks[middle:]):
            yield


_shared_locks: weakref.WeakSet[SharedLock] = weakref.WeakSet()


def _after_fork() -> None:
    """Reset all locks in a forked child, which has only one thread."""
    for lock in list(_shared_locks):
        lock._initialize()


run_in_forked_children(_after_fork)
