"""One writer at a time, between processes, on every platform."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["locked"]

#: Seconds between two questions.
PATIENCE = 0.2


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, given_up: Callable[[], bool] = bool) -> Iterator[None]:
    """Hold the lock file ``path`` until the block, or the process, ends; its folder is made if need be.

    Args:
        path: the lock file; it stays where it is, empty.
        wait: wait for another holder instead of raising.
        given_up: asked now and then whether to wait no longer.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is not set, or it was given up.
        OSError: the file cannot be made: a full or a read-only disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=PATIENCE if wait else 0)
            break
        except Timeout as error:
            if not wait or given_up():
                raise BlockingIOError(f"another process holds {str(path)!r}") from error
    try:
        yield
    finally:
        lock.release()
