"""The user's cache folder: what is kept there, and whom it trusts.

Files appear whole or not at all; object code carries a checksum, and is used only where nobody but the user can have
written it. The folder is kept small: see :func:`prune`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import platform
import re
import stat
import sys
import time
from pathlib import Path

from mirrormask.files import write_bytes

__all__ = ["cache_folder", "load_bytes", "processor_facts", "processor_name", "prune", "read", "store_bytes", "write"]

#: What the folder may hold: a ResNet-18's plan and code take 0.2 MB.
MOST_BYTES = 256 * 2**20
#: Files that no build read for so many days go.
MOST_DAYS = 90.0
#: Seconds since its last use within which no file is deleted.
UNTOUCHABLE = 3600.0
#: The folder is looked through at the first of so many stores of a process.
PRUNE_EVERY = 64
#: Plans and object code, and what a killed process left of them.
OWN_NAME = re.compile(r"([0-9a-f]{40}\.json|[a-z_]+_[0-9a-f]{24}\.o)|\.[0-9a-z_]+\.(json|o)\..*\.part")
_stores = itertools.count()


def cache_folder() -> Path:
    """``$MIRRORMASK_CACHE``, else ``mirrormask`` in the platform's cache folder."""
    if "MIRRORMASK_CACHE" in os.environ:
        return Path(os.environ["MIRRORMASK_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "mirrormask"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mirrormask"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mirrormask"


@functools.cache
def processor_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def processor_facts() -> str:
    """All that Linux says of the first processor's kind, instruction sets included; elsewhere its name."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        return "\n".join(line for line in first.splitlines() if line.partition(":")[0].strip() in wanted)
    return processor_name()


def load_bytes(name: str) -> bytes | None:
    """Object code stored under ``name``; ``None`` when there is none, it is damaged, or another may have written it."""
    try:
        if not _only_mine(os.stat(cache_folder())):
            return None
        data = read(f"{name}.o", trusted=True)
    except OSError:
        return None
    return data[32:] if hashlib.sha256(name.encode() + data[32:]).digest() == data[:32] else None


def store_bytes(name: str, data: bytes) -> None:
    """Keep object code under ``name``, with its checksum, for this user alone."""
    write(f"{name}.o", hashlib.sha256(name.encode() + data).digest() + data)
    with contextlib.suppress(OSError):
        os.chmod(cache_folder() / f"{name}.o", 0o600)


def prune(most_bytes: int = MOST_BYTES, most_days: float = MOST_DAYS) -> int:
    """Delete the files that were not used for longest until the others fit; returns how many went.

    Only files of this library's naming are touched. Those used within the last hour stay, whatever the limits: another
    process may be building with them. A file that is open or gone meanwhile is passed over, and a reader that has
    opened one keeps reading it.

    Args:
        most_bytes: the size of what stays.
        most_days: since the last use; a file that was not used for longer goes anyway.
    """
    now = time.time()
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(cache_folder()):
            if OWN_NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    facts = entry.stat()
                    found.append((now - facts.st_mtime, facts.st_size, entry.path))
    gone = 0
    kept = 0
    for age, size, path in sorted(found):
        kept += size
        if age > UNTOUCHABLE and (age > 86400 * most_days or kept > most_bytes):
            with contextlib.suppress(OSError):
                os.unlink(path)
                gone += 1
                kept -= size
    return gone


def read(name: str, *, trusted: bool = False) -> bytes:
    """The file's content; its time becomes that of its last use.

    Raises:
        OSError: there is none, or, where it must be ``trusted``, somebody else may have written it.
    """
    path = cache_folder() / name
    with path.open("rb") as file:
        if trusted and not _only_mine(os.fstat(file.fileno())):  # of the file that is read, whatever takes its place
            raise PermissionError(f"others may write {path}")
        data = file.read()
    with contextlib.suppress(OSError):
        os.utime(path)
    return data


def _only_mine(facts: os.stat_result) -> bool:
    """Whether a file or folder is this user's, and only theirs to write; Windows' cache folder is so by its place."""
    if os.name != "posix":
        return True
    return facts.st_uid == os.geteuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def write(name: str, data: bytes) -> None:
    """Keep a file; a folder that cannot be written to is no reason to fail."""
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(folder / name, data)
        if next(_stores) % PRUNE_EVERY == 0:
            prune()
