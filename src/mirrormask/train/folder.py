"""A folder of images, one folder a class, decoded once into tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirrormask import files
from mirrormask.machine import cache
from mirrormask.train import image_files
from mirrormask.train.image_files import LISTED, scan, shown

__all__ = ["load"]

#: Changes when decoding does, so that tensors decoded by an older version are not read.
CACHE_VERSION = 4

Part = tuple[Tensor, Tensor]


def load(root: Path, size: int | None = None) -> tuple[Part, Part, tuple[str, ...]]:
    """Read ``root/train`` and ``root/test`` (or ``root/val``).

    The decoded images are kept in the cache of :mod:`mirrormask.machine.cache`, which asks whose it is, with their
    checksum and under a key of the path and of every file's name, size and times of change, so that the second start
    reads one file.

    Args:
        root: the folder.
        size: side in pixels; an image is scaled so that its shorter side is this, and its centre cut out.
            ``None`` takes the images as they are, and they must be of one size.

    Returns:
        ``(train_x, train_y), (test_x, test_y), classes``, with x uint8 (n, 3, height, width) in RGB.

    Raises:
        ValueError: a folder or class is missing or empty, an image cannot be read or has another size than the
            first; every one is named.
    """
    if not root.is_dir():
        raise ValueError(f"the data folder {str(root)!r} does not exist; give folder:PATH with train/ and test/ in it")
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        found = ", ".join(sorted(shown(entry.name) for entry in root.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{str(root)!r} must hold train/ and test/ (or val/), each with a folder a class; it holds {found}"
        )
    classes, train = scan(root / "train")
    test_classes, test = scan(test_root)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise ValueError(f"{test_root.name}/ and train/ do not have the same classes; only in one of them: {odd}")
    key = _key(root, [*train, *test], size)
    tensors = _cached(key)
    if tensors is None:
        x = _decode([path for path, _ in [*train, *test]], size)
        y = torch.tensor([label for _, label in [*train, *test]])
        tensors = {
            "train_x": x[: len(train)],
            "train_y": y[: len(train)],
            "test_x": x[len(train) :],
            "test_y": y[len(train) :],
        }
        if _key(root, [*train, *test], size) == key:  # else somebody writes there
            _keep(key, tensors)
    return (tensors["train_x"], tensors["train_y"]), (tensors["test_x"], tensors["test_y"]), classes


def _decode(paths: Sequence[str], size: int | None) -> Tensor:
    """All images as one uint8 tensor; every unreadable or misfitting one is named in one error."""

    def read(path: str) -> np.ndarray | str:
        try:
            return image_files.decode(path, size)
        except image_files.ImageError as error:
            return f"{shown(path)}: {error}"

    _check_memory(paths, size)
    # Pillow releases the interpreter while it decodes, so threads do.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(read, paths, chunksize=64))
    images = [result for result in results if not isinstance(result, str)]
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        _refuse("cannot be read", problems, "remove or replace them")
    shape = images[0].shape
    problems = [
        f"{shown(path)}: {image.shape[1]}x{image.shape[0]}"
        for path, image in zip(paths, images, strict=True)
        if image.shape != shape
    ]
    if problems:
        _refuse(
            f"are not {shape[1]}x{shape[0]} like {shown(paths[0])}", problems, "set data.size to resize all of them"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _check_memory(paths: Sequence[str], size: int | None) -> None:
    """Refuse what no memory holds, from the first image's header."""
    if size is None:
        from PIL import Image

        try:
            with Image.open(paths[0]) as image:
                pixels = image.width * image.height
        except Exception:  # named with the others
            return
    else:
        pixels = size * size
    needed = 2 * 3 * pixels * len(paths)  # once in a list, once stacked
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if needed > have:
        raise ValueError(
            f"{len(paths):,} images of {pixels:,} pixels take {files.size_text(needed)} while they are read, and this "
            f"machine has {files.size_text(have)}; set a smaller data.size"
        )


def _refuse(what: str, problems: list[str], remedy: str) -> None:
    lines = "\n  ".join(problems[:LISTED])
    more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    raise ValueError(f"{len(problems)} images {what}; {remedy}:\n  {lines}{more}")


def _key(root: Path, samples: Sequence[tuple[str, int]], size: int | None) -> str:
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, os.fsencode(root.resolve()).hex(), size]).encode())
    for path, label in samples:
        status = os.stat(path)
        # Who copies a file over another may copy its time too; that of its last change nobody sets.
        facts = f"\0{label}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n"
        digest.update(os.fsencode(path) + facts.encode())
    return digest.hexdigest()[:24]


def _cached(key: str) -> dict[str, Tensor] | None:
    """What was kept under this key, if every byte of it is what was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = _name(key)
    try:
        kept = cache.read(name)
        return load(kept[32:]) if kept[:32] == _checksum(name, kept[32:]) else None
    except (SafetensorError, OSError):
        return None  # it is made again


def _keep(key: str, tensors: dict[str, Tensor]) -> None:
    """Write the cache; a disk that is full or read-only costs the next start time, not this one its run."""
    from safetensors.torch import save

    data, name = save(tensors), _name(key)
    cache.write(name, _checksum(name, data) + data)


def _name(key: str) -> str:
    return f"{key}.images"


def _checksum(name: str, data: bytes) -> bytes:
    return hashlib.sha256(name.encode() + data).digest()
