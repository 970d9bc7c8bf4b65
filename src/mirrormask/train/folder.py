"""A folder of images, one folder a class, decoded once into tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirrormask import checks, files

__all__ = ["cache_folder", "load", "resized"]

#: How many unreadable images an error lists before it only counts.
LISTED = 20
#: Changes when decoding does, so that tensors decoded by an older version are not read.
CACHE_VERSION = 1

Part = tuple[Tensor, Tensor]


def cache_folder() -> Path:
    """Where decoded folders are kept: ``$XDG_CACHE_HOME/mirrormask``, or ``~/.cache/mirrormask``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirrormask"


def load(root: Path, size: int | None = None) -> tuple[Part, Part, tuple[str, ...]]:
    """Read ``root/train`` and ``root/test`` (or ``root/val``).

    The decoded images are kept in :func:`cache_folder` under a key of the path and of every file's name, size
    and time of change, so that the second start reads one file.

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
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{str(root)!r} must hold train/ and test/ (or val/), each with a folder a class; it holds {found}"
        )
    classes, train = _scan(root / "train")
    test_classes, test = _scan(test_root)
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
        _keep(key, tensors)
    return (tensors["train_x"], tensors["train_y"]), (tensors["test_x"], tensors["test_y"]), classes


def _scan(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    datasets = checks.require("torchvision.datasets", "train", "reading a folder of images")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        raise ValueError(f"{str(root)!r} has no classes; it must hold one folder a class, with images in it")
    try:
        found = datasets.ImageFolder(str(root))
    except FileNotFoundError as error:
        raise ValueError(f"{str(root)!r} cannot be used: {error}") from error
    return tuple(found.classes), list(found.samples)


def _decode(paths: Sequence[str], size: int | None) -> Tensor:
    """All images as one uint8 tensor; every unreadable or misfitting one is named in one error."""

    def read(path: str) -> np.ndarray | str:
        from PIL import Image

        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{path}: {error}"
        return np.asarray(resized(rgb, size))

    # Pillow releases the interpreter while it decodes, so threads do.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(read, paths, chunksize=64))
    images = [result for result in results if not isinstance(result, str)]
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        _refuse("cannot be read", problems, "remove or replace them")
    shape = images[0].shape
    problems = [
        f"{path}: {image.shape[1]}x{image.shape[0]}"
        for path, image in zip(paths, images, strict=True)
        if image.shape != shape
    ]
    if problems:
        _refuse(f"are not {shape[1]}x{shape[0]} like {paths[0]}", problems, "set data.size to resize all of them")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def resized(image: Any, size: int | None) -> Any:
    """A Pillow image, its shorter side scaled to ``size`` pixels, its centre cut out; None leaves it as it is."""
    if size is None:
        return image
    from PIL import Image

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _refuse(what: str, problems: list[str], remedy: str) -> None:
    lines = "\n  ".join(problems[:LISTED])
    more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    raise ValueError(f"{len(problems)} images {what}; {remedy}:\n  {lines}{more}")


def _key(root: Path, samples: Sequence[tuple[str, int]], size: int | None) -> str:
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, str(root.resolve()), size]).encode())
    for path, label in samples:
        status = os.stat(path)
        digest.update(f"{path}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _cached(key: str) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = cache_folder() / f"{key}.safetensors"
    try:
        return load_file(str(path)) if path.exists() else None
    except (SafetensorError, OSError):
        return None  # a damaged cache is made again


def _keep(key: str, tensors: dict[str, Tensor]) -> None:
    """Write the cache; a disk that is full or read-only costs the next start time, not this one its run."""
    from safetensors.torch import save

    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        files.write_bytes(cache_folder() / f"{key}.safetensors", save(tensors))
    except OSError:
        return
