"""Who may look at the rows while somebody writes: many readers, or one writer.

Each thread that reads has a lock of its own, which costs next to nothing as long as nobody writes; who writes takes all
of them. They are Python's own reentrant locks, taken by ``with`` and by nothing else: wherever an interrupt comes, each
is either held by somebody who will let it go, or free.
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
    """Held by any number of threads for reading, or by one for writing; both may be nested, in this order or the other.

    A thread that reads and wants to write waits for the other readers, and for who writes already: beside another that
    wants to write, both would wait for ever.

    Attributes:
        alone: Held for a moment by readers, one at a time, for what little they write.
    """

    def __init__(self) -> None:
        self._begin()
        _shared_locks.add(self)

    def _begin(self) -> None:
        self._own = threading.local()
        self._gate: Any = threading.RLock()  # who writes holds it, so that nobody begins to read
        self._all: weakref.WeakSet[Any] = weakref.WeakSet()  # of the threads that are alive
        self.alone = threading.RLock()  # a signal's handler may save while its thread counts

    @property
    def is_read(self) -> bool:
        """Whether this thread holds it."""
        return bool(self._lock_of_this_thread()._is_owned())

    @property
    def is_written(self) -> bool:
        """Whether this thread holds it for writing."""
        return bool(self._gate._is_owned())

    def reading(self) -> Any:
        """Hold it for reading, by ``with``."""
        lock = self._lock_of_this_thread()
        if not lock._is_owned():
            with self._gate:  # the others may read for ever, by turns
                pass
        return lock

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold it for writing."""
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
        return SharedLock, ()  # a copy is held by nobody

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedLock:
        return SharedLock()


@contextmanager
def _all_of(locks: Sequence[Any]) -> Iterator[None]:
    middle = len(locks) // 2
    if middle == 0:
        with locks[0]:
            yield
    else:  # by halves: there may be more threads than calls within each other
        with _all_of(locks[:middle]), _all_of(locks[middle:]):
            yield


_shared_locks: weakref.WeakSet[SharedLock] = weakref.WeakSet()


def _after_fork() -> None:
    """Let go, in a forked child, of what threads held that it does not have."""
    for lock in list(_shared_locks):
        lock._begin()


run_in_forked_children(_after_fork)
