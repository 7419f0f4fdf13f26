"""Hashes of files, by as many threads as help."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from softdb.snapshot.format import Sizes

__all__ = ["THREADS", "Digest", "Threads", "hash_of"]

# So many threads write and hash, or read and hash; and so many chunks wait for one, or are under way, at the most.
THREADS = min(4, os.cpu_count() or 1)


WAITING = THREADS + 2


class Threads(ThreadPoolExecutor):
    """Does at once what it is given where no thread is to be had: there are too many, or Python is about to end."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As that of any executor."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            return at_once(fn, *args, **kwargs)


def at_once(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Call a function here, as a future that is done."""
    done: Future[Any] = Future()
    try:
        done.set_result(fn(*args, **kwargs))
    except Exception as error:
        done.set_exception(error)
    return done


class Digest:
    """The hash of a file, of those of its chunks."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._waiting: deque[Future[bytes]] = deque()
        self._whole = hashlib.blake2b()

    def add(self, size: int, hashed: Callable[..., bytes], *arguments: Any) -> None:
        """Add the chunk of ``size`` bytes whose hash ``hashed`` makes; waits where many are under way."""
        do = self._threads.submit if size > Sizes.usual().part else at_once  # to start a thread would take longer
        self._waiting.append(do(hashed, *arguments))
        if len(self._waiting) > WAITING:
            self._whole.update(self._waiting.popleft().result())

    def hexdigest(self) -> str:
        """The hash, once all chunks are in."""
        while self._waiting:
            self._whole.update(self._waiting.popleft().result())
        return self._whole.hexdigest()


def hash_of(content: memoryview | bytes) -> bytes:
    """Return the hash of some bytes."""
    return hashlib.blake2b(content).digest()
