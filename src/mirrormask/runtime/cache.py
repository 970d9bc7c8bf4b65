"""What builds found, kept in the user's cache folder; a file that is damaged or of another version counts as none.

Files appear whole or not at all, and carry a checksum. The folder is kept small: see :func:`prune`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from mirrormask.files import write_bytes
from mirrormask.runtime.graph import Graph

__all__ = [
    "cache_folder",
    "graph_key",
    "load",
    "load_bytes",
    "processor_name",
    "prune",
    "store",
    "store_bytes",
    "weights_key",
]

#: Raised whenever the meaning of what is stored changes.
FORMAT = 2
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


def weights_key(graphs: list[Graph], *facts: object) -> str:
    """A hash of the graphs' layers, where their zeros are, and ``facts``; whatever the shapes of the inputs."""
    digest = hashlib.blake2b(repr((FORMAT, facts)).encode(), digest_size=20)
    for graph in graphs:
        for node in graph.layers():
            assert node.weight is not None
            digest.update(repr((node.op, node.stride, node.padding, node.groups, node.weight.shape)).encode())
            digest.update((node.weight.values if node.weight.gaps is None else node.weight.gaps).tobytes())
    return digest.hexdigest()


def graph_key(graphs: list[Graph], *facts: object) -> str:
    """A hash of the graphs, shapes included and weights left out, and of ``facts``."""
    digest = hashlib.blake2b(repr((FORMAT, facts)).encode(), digest_size=20)
    for graph in graphs:
        digest.update(repr((graph.rows, graph.flattens, graph.inputs, graph.outputs, graph.shapes)).encode())
        for node in graph.nodes:
            plain = [getattr(node, f.name) for f in fields(node) if f.name not in ("weight", "bias", "layer", "origin")]
            digest.update(repr(plain).encode())
    return digest.hexdigest()


def load(key: str) -> dict[str, Any] | None:
    """What was stored under ``key``; ``None`` when there is nothing, or nothing that can be trusted."""
    try:
        stored = json.loads(_read(f"{key}.json"))
        body = stored["body"]
        if stored["key"] != key or stored["checksum"] != _checksum(key, body):
            return None
        return dict(body)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(key: str, body: dict[str, Any]) -> None:
    """Keep ``body`` under ``key``; a folder that cannot be written to is no reason to fail."""
    body = json.loads(json.dumps(body))
    text = json.dumps({"key": key, "checksum": _checksum(key, body), "body": body})
    _write(f"{key}.json", text.encode())


def load_bytes(name: str) -> bytes | None:
    """Object code stored under ``name``; ``None`` when there is none, or it is damaged."""
    try:
        data = _read(f"{name}.o")
    except OSError:
        return None
    return data[32:] if hashlib.sha256(name.encode() + data[32:]).digest() == data[:32] else None


def store_bytes(name: str, data: bytes) -> None:
    """Keep object code under ``name``, with its checksum."""
    _write(f"{name}.o", hashlib.sha256(name.encode() + data).digest() + data)


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


def _read(name: str) -> bytes:
    """The file's content; its time becomes that of its last use."""
    path = cache_folder() / name
    data = path.read_bytes()
    with contextlib.suppress(OSError):
        os.utime(path)
    return data


def _write(name: str, data: bytes) -> None:
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, data)
        if next(_stores) % PRUNE_EVERY == 0:
            prune()


def _checksum(key: str, body: object) -> str:
    return hashlib.sha256((key + json.dumps(body, sort_keys=True)).encode()).hexdigest()
