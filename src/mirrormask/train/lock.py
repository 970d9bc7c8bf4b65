"""One writer at a time, between processes, on every platform."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["locked"]


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` until the block, or the process, ends; its folder is made if need be.

    Args:
        path: the lock file; it stays where it is, empty.
        wait: wait for another holder instead of raising.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is not set.
        OSError: the file cannot be made: a full or a read-only disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=wait)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"another process holds {str(path)!r}") from error
    try:
        yield
    finally:
        lock.release()
