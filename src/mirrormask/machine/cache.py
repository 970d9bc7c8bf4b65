"""The user's cache folder: where it lies, what is kept there, and whom it trusts.

Files appear whole or not at all. Nothing is read or written where anybody but the user can have written, or can put
something else in its place: native code lies here, and what decides which code runs. :func:`_walk` looks at the way to
the folder, from the root down; the folder itself and its files are looked at by their descriptors, so that what was
looked at is what is used. The folder is kept small: see :func:`prune`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import platform
import re
import secrets
import stat
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mirrormask.checks import callers_level

__all__ = [
    "cache_folder",
    "load_bytes",
    "processor_facts",
    "processor_name",
    "prune",
    "read",
    "source_hash",
    "store_bytes",
    "write",
]

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
#: As many links may lead to the folder; more go in a circle.
MOST_LINKS = 40
#: Without these, a link would be followed, and a pipe would be waited for.
CAREFULLY = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_stores = itertools.count()
#: Taken, and never given back, by the one warning of this process.
_warned = threading.Lock()


class Untrusted(PermissionError):
    """Somebody else may have written it, or may put something else there."""


def cache_folder() -> Path | None:
    """Where the cache is: the first that is set of ``$MIRRORMASK_CACHE``, ``$XDG_CACHE_HOME/mirrormask`` and the
    folder ``mirrormask`` in the platform's cache folder in the user's home.

    An empty ``$MIRRORMASK_CACHE`` means no cache. A relative one starts at the folder in which the process was when it
    first asked, and stays there. ``$XDG_CACHE_HOME`` counts as not set when it is empty or relative, as the XDG
    specification has it.

    Returns:
        The folder, which need not exist; None: no cache, by the user's wish or for want of a home.
    """  # fmt: skip
    if "MIRRORMASK_CACHE" in os.environ:
        return _absolute(os.environ["MIRRORMASK_CACHE"])
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):
        return Path(shared) / "mirrormask"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "mirrormask"
    try:
        home = Path.home()
    except (RuntimeError, KeyError, OSError):  # HOME is not set, and the user has no entry in the passwd file
        return None
    # One that is not there is not made either: containers name a home that was never meant to be.
    if (os.name == "posix" and os.environ.get("HOME") == "") or not home.is_absolute() or not os.path.isdir(home):
        return None
    own = {"win32": ("AppData", "Local"), "darwin": ("Library", "Caches")}.get(sys.platform, (".cache",))
    return home.joinpath(*own, "mirrormask")


@functools.cache
def _absolute(path: str) -> Path | None:
    """``path`` from the current folder, whatever that becomes later; None for an empty one."""
    with contextlib.suppress(OSError):  # the current folder may be gone
        return Path(os.path.abspath(path)) if path else None
    return None


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


@functools.cache
def source_hash() -> str:
    """A hash of the code that makes what lies in the cache: what another version of it stored is not used."""
    digest = hashlib.sha256()
    machine = Path(__file__).parent
    for folder in (machine.parent / "runtime", machine):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def load_bytes(name: str) -> bytes | None:
    """Object code stored under ``name``; ``None`` when there is none, it is damaged, or another may have written it."""
    try:
        data = read(f"{name}.o")
    except OSError:
        return None
    return data[32:] if hashlib.sha256(name.encode() + data[32:]).digest() == data[:32] else None


def store_bytes(name: str, data: bytes) -> None:
    """Keep object code under ``name``, with its checksum."""
    write(f"{name}.o", hashlib.sha256(name.encode() + data).digest() + data)


def prune(most_bytes: int = MOST_BYTES, most_days: float = MOST_DAYS) -> int:
    """Delete the files that were not used for longest until the others fit; returns how many went.

    Only files of this library's naming are touched. Those used within the last hour stay, whatever the limits: another
    process may be building with them. A file that is open or gone meanwhile is passed over, and a reader that has
    opened one keeps reading it.

    Args:
        most_bytes: the size of what stays.
        most_days: since the last use; a file that was not used for longer goes anyway.
    """
    with contextlib.suppress(OSError), _Told(), _opened() as folder:
        return _prune(folder, most_bytes, most_days)
    return 0


def read(name: str) -> bytes:
    """The file's content; its time becomes that of its last use.

    Raises:
        OSError: there is none, or somebody else may have written it.
    """
    with _Told(), _opened() as folder:
        path = folder.path_of(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | CAREFULLY, dir_fd=folder.descriptor)
        except OSError:
            folder.check(name)  # whether that is why
            raise
        try:
            facts = os.fstat(descriptor)
            _check(facts, folder.path / name)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "not a file", name)
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read()
        finally:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            os.utime(path, dir_fd=folder.descriptor)
        return data


def write(name: str, data: bytes) -> None:
    """Keep a file, for this user alone; a folder that cannot be written to is no reason to fail."""
    with contextlib.suppress(OSError), _Told(), _opened(make=True) as folder:
        folder.check(name)
        _write(folder, name, data)
        if next(_stores) % PRUNE_EVERY == 0:
            _prune(folder, *prune.__defaults__)  # type: ignore[misc]


class _Folder(NamedTuple):
    """The cache's folder, open; without a descriptor where the platform cannot work from one (Windows)."""

    path: Path
    descriptor: int | None

    def path_of(self, name: str) -> str:
        """What a call with ``dir_fd=self.descriptor`` takes."""
        return str(self.path / name) if self.descriptor is None else name

    def check(self, name: str) -> None:
        """Refuse a file that is there and not the user's alone.

        Raises:
            Untrusted: it belongs to another, others may write it, or it is a link.
        """
        with contextlib.suppress(FileNotFoundError):
            facts = os.stat(self.path_of(name), dir_fd=self.descriptor, follow_symlinks=False)
            _check(facts, self.path / name)


class _Told:
    """Around what reads and writes: warns of the first place or file of this process that is not to be trusted."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, Untrusted) and _warned.acquire(blocking=False):
            warnings.warn(
                f"{error}. It is neither read nor written, and what it would hold is made anew in each process: put "
                "that right, or set MIRRORMASK_CACHE to a folder that only you can write (empty: no cache)",
                RuntimeWarning,
                stacklevel=callers_level(),
            )


@contextlib.contextmanager
def _opened(make: bool = False) -> Iterator[_Folder]:
    """The folder, if it is to be trusted.

    Args:
        make: make it, with what is missing above it.

    Raises:
        OSError: there is none.
        Untrusted: it is not only the user's.
    """
    path = cache_folder()
    if path is None:
        raise FileNotFoundError("no cache")
    if os.name != "posix":  # there the cache folder is the user's own by its place
        if make:
            path.mkdir(parents=True, exist_ok=True)
        yield _Folder(path, None)
        return
    path = _walk(path, make)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | CAREFULLY)
    try:
        _check(os.fstat(descriptor), path)
        yield _Folder(path, descriptor)
    finally:
        os.close(descriptor)


def _walk(path: Path, make: bool) -> Path:
    """The folder's own path, without links, after a look at every step of the way.

    From the root down, each step is a folder in which nobody but root and the user can exchange the next one; so what
    was seen stays so, however long ago that was. Where there is no folder, and none can be made, nothing is amiss.

    Raises:
        OSError: it is not there, and was not or could not be made.
        Untrusted: somebody else can put another folder in its place.
    """
    real, left, links = "/", list(path.parts[:0:-1]), 0
    fault = _fault_of_step(os.stat(real), real)
    while left:
        name = left.pop()
        if name == "..":
            real = os.path.dirname(real)
            continue
        step = os.path.join(real, name)
        try:
            facts = os.lstat(step)
        except FileNotFoundError:
            if not make or not os.access(real, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise
            if fault:
                raise Untrusted(fault) from None
            with contextlib.suppress(FileExistsError):  # another process made it at the same time
                os.mkdir(step, 0o700)
            facts = os.lstat(step)
        if stat.S_ISLNK(facts.st_mode):
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, "too many links", str(path))
            fault = fault or _fault_of_owner(facts, step)
            target = os.readlink(step)
            real = "/" if os.path.isabs(target) else real
            left += [part for part in reversed(target.split("/")) if part not in ("", ".")]
            continue
        if left:
            fault = fault or _fault_of_step(facts, step)
        real = step
    if fault:
        raise Untrusted(fault)
    return Path(real)


def _check(facts: os.stat_result, path: Path) -> None:
    """Of the folder and of its files: nobody but this user may have written them.

    Raises:
        Untrusted: somebody else may.
    """
    if os.name != "posix":
        return
    if stat.S_ISLNK(facts.st_mode):
        raise Untrusted(f"{path} is a symbolic link, which no file of the cache is (rm '{path}')")
    if facts.st_uid != os.geteuid():
        raise Untrusted(f"{path} belongs to {_name_of(facts.st_uid)}, and this process to {_name_of(os.geteuid())}")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted(f"{path} can be written by others (chmod go-w '{path}')")


def _fault_of_step(facts: os.stat_result, path: str) -> str:
    """Who but root and this user may rename what is in a folder on the way; empty: nobody."""
    sticky = facts.st_mode & stat.S_ISVTX  # as /tmp: each may rename what is theirs
    group = facts.st_mode & stat.S_IWGRP and not _is_mine_alone(facts.st_gid)
    if not sticky and (group or facts.st_mode & stat.S_IWOTH):
        return f"{path}, in which the cache lies, can be written by others (chmod go-w '{path}')"
    return _fault_of_owner(facts, path)


def _fault_of_owner(facts: os.stat_result, path: str) -> str:
    """Whose a folder or link on the way is, if not root's or this user's."""
    if facts.st_uid in (0, os.geteuid()) or _is_unmapped(facts.st_uid):
        return ""
    return f"{path}, on the way to the cache, belongs to {_name_of(facts.st_uid)}, who may exchange what is behind it"


def _is_mine_alone(group: int) -> bool:
    """Whether a group is the one that some systems make for each user, and then let it write by default."""
    import grp
    import pwd

    try:
        facts, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid())
    except (KeyError, OSError):
        return False
    return 0 != group == user.pw_gid and facts.gr_name == user.pw_name and not set(facts.gr_mem) - {user.pw_name}


def _is_unmapped(user: int) -> bool:
    """Whether this is how a sandbox shows all users that it does not know, root of the system among them."""
    with contextlib.suppress(OSError, ValueError):
        known = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        everybody = any(int(count) >= 2**32 - 1 for _, _, count in known)
        return not everybody and user == int(Path("/proc/sys/kernel/overflowuid").read_text())
    return False


def _name_of(user: int) -> str:
    import pwd

    with contextlib.suppress(KeyError, OSError):
        return f"{pwd.getpwuid(user).pw_name} (user {user})"
    return f"user {user}"


def _write(folder: _Folder, name: str, data: bytes) -> None:
    """Write beside the file, then rename: whoever reads finds the old file, the new one, or none."""
    part = folder.path_of(f".{name}.{secrets.token_hex(6)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | CAREFULLY
    descriptor = os.open(part, flags, 0o600, dir_fd=folder.descriptor)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        path = folder.path_of(name)
        os.replace(part, path, src_dir_fd=folder.descriptor, dst_dir_fd=folder.descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part, dir_fd=folder.descriptor)
        raise
    if folder.descriptor is not None:
        os.fsync(folder.descriptor)


def _prune(folder: _Folder, most_bytes: int, most_days: float) -> int:
    now = time.time()
    found = []
    with os.scandir(folder.path if folder.descriptor is None else folder.descriptor) as entries:
        for entry in entries:
            if OWN_NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    facts = entry.stat(follow_symlinks=False)
                    # A time to come is of a clock that went wrong, and would keep its file for ever.
                    found.append((abs(now - facts.st_mtime), facts.st_size, entry.name))
    gone = 0
    kept = 0
    for age, size, name in sorted(found):
        kept += size
        if age > UNTOUCHABLE and (age > 86400 * most_days or kept > most_bytes):
            with contextlib.suppress(OSError):
                os.unlink(folder.path_of(name), dir_fd=folder.descriptor)
                gone += 1
                kept -= size
    return gone
