"""One checkpoint as a file: tensors and the tree that they hang in, each part with its checksum.

The container is safetensors', which any reader of that format opens. ``__metadata__`` has the checksum of the header,
``mirrormask.checkpoint`` (a version), ``mirrormask.recipe`` (the fingerprint of the recipe) and
``mirrormask.sha256``: part -> SHA-256. The part ``tree`` is the JSON text of :func:`mirrormask.train.tree.flatten`, the
others are its tensors. Nothing in the file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirrormask import files
from mirrormask.storage.container import Container, Extent, build_header, open_container, parse_json, read_exactly
from mirrormask.storage.dtypes import BYTES
from mirrormask.storage.errors import FormatError
from mirrormask.storage.torch_types import NAMES, TYPES, to_bits
from mirrormask.train.tree import TreeError, flatten, restore

__all__ = ["VERSION", "CheckpointError", "DamagedError", "read", "write"]

#: Changes when the layout of a checkpoint does; version 1 was torch's pickle, in ``checkpoint.pt``.
VERSION = "2"
VERSION_KEY, RECIPE_KEY, DIGESTS_KEY = "mirrormask.checkpoint", "mirrormask.recipe", "mirrormask.sha256"
TREE = "tree"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, what is wrong with it and what to do."""


class DamagedError(CheckpointError):
    """The file is not what was written: cut, flipped, emptied, or no checkpoint at all.

    Args:
        message: what is wrong.
        path: the file.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


def write(path: Path, fingerprint: str, state: Any) -> int:
    """Write a tree of plain values and tensors, whole or not at all; the number of bytes.

    Args:
        path: where; its folder must exist.
        fingerprint: of the recipe that the state belongs to.
        state: see :func:`mirrormask.train.tree.flatten`.

    Raises:
        TreeError: the state holds something of another kind.
        OSError: the file cannot be written; names the path, the bytes needed and those that are free.
    """
    tree, tensors = flatten(state)
    text = json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()
    unknown = [str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in NAMES]
    if unknown:
        raise TreeError(f"a tensor of type {unknown[0]} cannot be written; known: {', '.join(map(str, NAMES))}")
    # Wide elements first, so that every part is aligned; the text comes last.
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    parts = [(name, NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in order]
    digests = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in order}
    digests[TREE] = hashlib.sha256(text).hexdigest()
    metadata = {VERSION_KEY: VERSION, RECIPE_KEY: fingerprint, DIGESTS_KEY: json.dumps(digests, separators=(",", ":"))}
    header = build_header([*parts, (TREE, "U8", [len(text)])], metadata)
    nbytes = len(header) + sum(tensor.nbytes for tensor in tensors.values()) + len(text)
    with files.atomic_write(path, expected=nbytes) as file:
        file.write(header)
        for _, tensor in order:
            file.write(_bytes(tensor))
        file.write(text)
    return nbytes


def read(path: Path, fingerprint: str) -> Any:
    """The tree that :func:`write` was given, its tensors on the CPU; every byte of it has been checked.

    Raises:
        DamagedError: the file is not a whole checkpoint.
        CheckpointError: it is of another version or of another recipe, or cannot be opened.
    """
    try:
        if not path.is_file():
            raise FormatError("it is not a file")
        with open(path, "rb") as file:
            container = open_container(file, os.fstat(file.fileno()).st_size)
            _check_kind(path, container, fingerprint)
            return _read(container)
    except (FormatError, TreeError) as error:
        raise DamagedError(f"the checkpoint {str(path)!r} is damaged: {error}", path) from error
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"the checkpoint {str(path)!r} cannot be read: {reason}; mend that, or remove it"
        ) from error


def _check_kind(path: Path, container: Container, fingerprint: str) -> None:
    version = container.metadata.get(VERSION_KEY)
    if version is None:
        raise FormatError("it is a safetensors file, but no checkpoint of a run")
    if version != VERSION:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} has version {version[:20]!r}, this mirrormask reads {VERSION!r}; go on with "
            "the one that wrote it, or remove it"
        )
    if container.metadata.get(RECIPE_KEY) != fingerprint:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} belongs to another recipe; choose another --out, or remove it"
        )


def _read(container: Container) -> Any:
    digests = parse_json(container.metadata.get(DIGESTS_KEY, ""), "the table of checksums")
    if set(digests) != set(container.tensors):
        raise FormatError("its checksums are not those of its parts")
    parts: dict[str, bytearray] = {}
    for name, extent in container.tensors.items():
        parts[name] = read_exactly(container.file, extent.start, extent.nbytes)
        if hashlib.sha256(parts[name]).hexdigest() != digests[name]:
            raise FormatError("its bytes do not match their checksum", tensor=name)
    if TREE not in parts:
        raise FormatError("it has no tree")
    try:
        tree = json.loads(parts.pop(TREE))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its tree is not JSON: {str(error)[:200]}") from None
    return restore(tree, {name: _tensor(raw, container.tensors[name]) for name, raw in parts.items()})


def _bytes(tensor: Tensor) -> memoryview:
    return to_bits(tensor).view(np.uint8).data


def _tensor(raw: bytearray, extent: Extent) -> Tensor:
    if not raw:
        return torch.empty(extent.shape, dtype=TYPES[extent.dtype])
    assert len(raw) % BYTES[extent.dtype] == 0  # open_container compared them
    return torch.frombuffer(raw, dtype=TYPES[extent.dtype]).reshape(extent.shape)
