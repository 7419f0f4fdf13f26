"""Hashes of files, computed by several threads."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from softdb.snapshot.format import Sizes

__all__ = ["MAX_THREADS", "FileHash", "ThreadPool", "compute_hash"]

# Maximum number of threads that read or write chunks and hash them.
MAX_THREADS = min(4, os.cpu_count() or 1)

# Maximum number of chunks that are queued or in progress.
MAX_PENDING_CHUNKS = MAX_THREADS + 2


class ThreadPool(ThreadPoolExecutor):
    """Thread pool that runs a task in the calling thread if no thread can start.

    Threads cannot start if there are too many, or if the interpreter is shutting down.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule a call, as `concurrent.futures.Executor.submit` does."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            return call_now(fn, *args, **kwargs)


def call_now(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Call a function in this thread; return a completed future."""
    done: Future[Any] = Future()
    try:
        done.set_result(fn(*args, **kwargs))
    except Exception as error:
        done.set_exception(error)
    return done


class FileHash:
    """Hash of a file, computed from the hashes of its chunks."""

    def __init__(self, threads: ThreadPool) -> None:
        self._threads = threads
        self._waiting: deque[Future[bytes]] = deque()
        self._whole = hashlib.blake2b()

    def add(self, size: int, hashed: Callable[..., bytes], *arguments: Any) -> None:
        """Add a chunk; wait if too many chunks are pending.

        Args:
            size: Number of bytes of the chunk.
            hashed: Function that returns the hash of the chunk.
            *arguments: Arguments of ``hashed``.
        """
        # Hashing a small chunk takes less time than starting a thread.
        do = self._threads.submit if size > Sizes.default().part else call_now
        self._waiting.append(do(hashed, *arguments))
        if len(self._waiting) > MAX_PENDING_CHUNKS:
            self._whole.update(self._waiting.popleft().result())

    def hexdigest(self) -> str:
        """Return the hash of all chunks, after waiting for them."""
        while self._waiting:
            self._whole.update(self._waiting.popleft().result())
        return self._whole.hexdigest()


def compute_hash(content: memoryview | bytes) -> bytes:
    """Compute the hash of bytes."""
    return hashlib.blake2b(content).digest()
