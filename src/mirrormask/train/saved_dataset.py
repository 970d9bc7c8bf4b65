"""A folder of images that Hugging Face's library ``datasets`` has saved, decoded into tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirrormask import checks
from mirrormask.checks import few
from mirrormask.train.image_files import plain, resized

__all__ = ["load"]

#: The names that splits for testing go by.
TEST = ("test", "validation", "val", "valid")
#: What columns are called of which there are several.
IMAGES, LABELS = ("image", "img"), ("label", "labels")


def load(root: Path, size: int | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """Read what ``DatasetDict.save_to_disk(root)`` has left: a split ``train``, and one to test on.

    Args:
        root: the folder.
        size: side in pixels; an image is scaled so that its shorter side is this, and its centre cut out. ``None``
            takes the images as they are, and they must be of one size.

    Returns:
        ``(train_x, train_y), (test_x, test_y), classes``, with x uint8 (n, 3, height, width) in RGB.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: there is no such folder, a split or a column is missing, a split has images without a label or
            without an image, or classes that the other has not, images differ in size or are of no known range.
    """
    if not root.is_dir():
        raise ValueError(f"the data folder {str(root)!r} does not exist (here: {Path.cwd()})")
    datasets = checks.require("datasets", "datasets", f"the data {str(root)!r}")
    try:
        found = datasets.load_from_disk(str(root))
    except FileNotFoundError as error:
        raise ValueError(f"{str(root)!r} is no folder of datasets.save_to_disk: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(root)!r} holds one split; save a DatasetDict with 'train' and 'test'")
    test = next((name for name in TEST if name in found), None)
    if "train" not in found or test is None:
        raise ValueError(f"{str(root)!r} holds the splits {', '.join(found)}; it must hold 'train' and 'test'")
    classes = _classes(found["train"], root)
    if set(_classes(found[test], root)) != set(classes):
        odd = sorted(set(classes) ^ set(_classes(found[test], root)))
        raise ValueError(
            f"{str(root)!r}: {test!r} and 'train' do not have the same classes; only in one of them: {odd}"
        )
    return _part(found, "train", classes, root, size), _part(found, test, classes, root, size), classes


def _classes(part: Any, root: Path) -> tuple[str, ...]:
    return tuple(part.features[_column(part, "ClassLabel", LABELS, root)].names)


def _column(part: Any, kind: str, usual: tuple[str, ...], root: Path) -> str:
    """The one column of this kind; where there are several, the one that is called as usual."""
    columns: list[str] = [name for name, feature in part.features.items() if type(feature).__name__ == kind]
    chosen = [name for name in columns if name in usual] if len(columns) > 1 else columns
    if len(chosen) != 1:
        held = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in part.features.items())
        raise ValueError(
            f"{str(root)!r} must have one column of kind {kind}, or one called {usual[0]!r}; it has {held}"
        )
    return chosen[0]


def _part(found: Any, split: str, classes: tuple[str, ...], root: Path, size: int | None) -> tuple[Tensor, Tensor]:
    """Images, and labels as places in ``classes``: a split may list them in another order."""
    part = found[split].with_format(None)  # as plain objects, whatever it was saved as
    image, label = _column(part, "Image", IMAGES, root), _column(part, "ClassLabel", LABELS, root)
    part = part.cast_column(image, type(part.features[image])())  # decoded
    labels, own = list(part[label]), _classes(part, root)
    bad = [str(index) for index, value in enumerate(labels) if value is None or not 0 <= value < len(own)]
    if bad:
        raise ValueError(
            f"{str(root)!r}: {split!r} has no class in {label!r} at {few(bad)} (of {len(labels)}), as a split without "
            "labels has; leave it out, and what is called validation is tested on"
        )
    arrays = []
    for index, row in enumerate(part[image]):
        if row is None:
            raise ValueError(f"{str(root)!r}: {split!r} has no image in {image!r} at {index}; leave it out")
        arrays.append(np.asarray(resized(plain(row), size)))
    shapes = sorted({array.shape[:2] for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"images are of {len(shapes)} sizes, such as {shapes[0]} and {shapes[-1]}; set data.size")
    if not arrays:
        raise ValueError("a split has no images")
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor([classes.index(own[value]) for value in labels])
