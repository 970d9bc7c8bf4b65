"""The data of a comparison as one safetensors file, which every worker maps into its memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mirrormask import files
from mirrormask.storage.container import build_header
from mirrormask.storage.torch_types import NAMES, to_bits
from mirrormask.train.data import Images, Splits

__all__ = ["NAME", "read", "write"]

#: In the comparison's folder, while workers run.
NAME = ".data.safetensors"
PARTS = ("train", "test", "validation")


def write(splits: Splits, path: Path) -> None:
    """Write the data, atomically.

    Raises:
        OSError: there is no room for it.
    """
    held = [(part, getattr(splits, part)) for part in PARTS]
    # Labels first: wide elements before narrow ones are aligned.
    tensors = {
        f"{part}.{key}": getattr(images, key).contiguous()
        for key in "yx"
        for part, images in held
        if images is not None
    }
    parts = [(name, NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()]
    header = build_header(parts, {"classes": json.dumps(list(splits.classes))})
    nbytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with files.atomic_write(path, expected=nbytes) as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(to_bits(tensor.reshape(-1)).view(np.uint8).data)


def read(path: str) -> Splits:
    """What :func:`write` wrote; the images are not read before they are used."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        classes = json.loads(file.metadata()["classes"])
    found = [Images(tensors[f"{p}.x"], tensors[f"{p}.y"]) if f"{p}.x" in tensors else None for p in PARTS]
    train, test, validation = found
    if train is None or test is None:
        raise ValueError(f"{path!r} holds no data of a comparison")
    return Splits(train, test, validation, tuple(classes))
