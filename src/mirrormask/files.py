"""Atomic writing: whoever reads a path finds the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["PART", "atomic_write", "explained", "remove_parts", "size_text", "sync_folder", "write_bytes", "write_text"]

#: How the name of a temporary file ends.
PART = ".part"
#: Bytes that the name of a file may have.
LONGEST = 255


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", *, expected: int | None = None) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; on leaving without an exception, fsync it and rename it to ``path``.

    A process that is killed at any moment, and a disk that fills up, leave the old file as it was. A link stays one:
    the file that it leads to is written. Who may read an old file may read the new one, and nobody else.

    Args:
        path: where the file shall be; its folder must exist.
        mode: ``"wb"`` or ``"w"`` (UTF-8).
        expected: how many bytes it will have, for the message where there is no room.

    Raises:
        OSError: the file cannot be written; with its path, the bytes it takes and those that are free.
    """
    target, name, written = Path(path), None, None
    try:
        if target.is_symlink():
            target = Path(os.path.realpath(target))
        permissions = _permissions(target)
        handle, name = _opened_beside(target, permissions)
        try:
            file = os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8")
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            finally:
                written = os.fstat(file.fileno()).st_size
                file.close()
            if permissions is not None:
                os.chmod(name, permissions)
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):  # its folder may be gone, or read-only by now
                os.unlink(name)
            raise
    except OSError as error:
        if error.errno is None or (error.filename not in (None, name, str(name)) and name is not None):
            raise  # of something else that the caller did meanwhile
        raise explained(error, target, expected, written) from error
    sync_folder(target.parent)


def _permissions(target: Path) -> int | None:
    """Those of the file that will be replaced; ``None`` where there is none.

    Raises:
        OSError: it is no ordinary file. A device would be replaced, and a folder cannot be.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not an ordinary file", str(target))
    return stat.S_IMODE(mode)


def _opened_beside(target: Path, permissions: int | None) -> tuple[int, Path]:
    """A new file beside ``target``, of a name that no other writer has, and no more open than it will be.

    Without a file before it, it has the permissions that ``open()`` gives: the process's umask need not be asked for,
    which is to change it for a moment, for other threads too.
    """
    mode = 0o666 if permissions is None else 0o600 | permissions & 0o666
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    for _ in range(100):
        end = f".{secrets.token_hex(4)}{PART}"
        head = os.fsencode(f".{target.name}")[: LONGEST - len(end)].decode(errors="ignore")
        name = target.parent / (head + end)
        with contextlib.suppress(FileExistsError):
            return os.open(name, flags, mode), name
    raise FileExistsError(errno.EEXIST, "no name is left for a temporary file", str(target))


def explained(error: OSError, path: Path, expected: int | None = None, written: int | None = None) -> OSError:
    """The error that says which file could not be written, how many bytes it takes and how many are free.

    Args:
        error: the system's.
        path: the file that was to be written.
        expected: its bytes, if known.
        written: those that were written before the error.
    """
    reason = error.strerror or str(error)
    try:
        free = f", {shutil.disk_usage(path.parent).free:,} free"
    except OSError:
        free = ", and its folder is gone"
    size = f"{expected:,} bytes" if expected is not None else f"stopped after {written or 0:,} bytes"
    return type(error)(error.errno, f"{reason}: writing {size}{free}; the old file is untouched", str(path))


def remove_parts(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove the temporary files that killed writers have left in ``folder``.

    Call it only where no other process can be writing these.

    Args:
        folder: where; it need not exist.
        names: of the files that they were to become; all files by default.
    """
    heads = (".",) if names is None else tuple(f".{name}." for name in names)
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.name.endswith(PART) and entry.name.startswith(heads):
                entry.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_write(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every platform lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def size_text(n: float) -> str:
    """A number of bytes for tables.

    Example:
        >>> size_text(15900), size_text(2.5e6)
        ('15.9 kB', '2.50 MB')
    """
    return f"{n / 1e6:.2f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"
