"""Files that lie: well-formed containers, rightly signed, whose index and arrays say what a test wants them to."""

import hashlib
import json

from mirrormask.storage.container import build_header
from mirrormask.storage.dtypes import BYTES


def forge(entries, arrays, **overrides):
    """A whole file, as bytes.

    Args:
        entries: tensor name -> index entry; where ``"sha256"`` is missing, the right checksums are filled in.
        arrays: stored name -> (dtype, shape, bytes).
        overrides: ``format_version``, ``separator``, ``index`` (text) instead of the right ones.
    """
    index = {name: dict(entry) if isinstance(entry, dict) else entry for name, entry in entries.items()}
    for name, entry in index.items():
        if isinstance(entry, dict) and "sha256" not in entry and entry.get("encoding") != "tied":
            stored = {key: key[len(name) + 2 :] for key in arrays if key == name or key.startswith(name + "::")}
            entry["sha256"] = {part: hashlib.sha256(arrays[key][2]).hexdigest()[:32] for key, part in stored.items()}
    order = sorted(arrays, key=lambda key: -BYTES[arrays[key][0]])
    own = {"format_version": "2", "separator": "::", "index": json.dumps(index), **overrides}
    metadata = {f"mirrormask.{key}": value for key, value in own.items() if value is not None}
    header = build_header([(key, arrays[key][0], arrays[key][1]) for key in order], metadata)
    return header + b"".join(arrays[key][2] for key in order)


def one(encoding, dtype, shape, parts, name="w", **fields):
    """A file with one tensor. ``parts``: part -> (dtype, bytes); one-dimensional, except for the dense part ``""``."""
    arrays = {}
    for part, (kind, data) in parts.items():
        size = shape if part == "" else [len(data) // BYTES[kind]]
        arrays[name + "::" + part if part else name] = (kind, size, data)
    return forge({name: {"encoding": encoding, "dtype": dtype, "shape": shape, **fields}}, arrays)


def raw(header, data=b""):
    """A file with any header, as an object or as bytes, unsigned."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
