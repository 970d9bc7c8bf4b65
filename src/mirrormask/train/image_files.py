"""Which images lie in a folder of classes, and one of them decoded: the disk is not trusted in either."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_PIXELS", "ImageError", "decode", "plain", "resized", "scan", "shown"]

#: What counts as an image; other files are passed over.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: Of an image, as it lies there and as it would be resized: 150 MB once decoded.
MAX_PIXELS = 50_000_000
#: How many things an error lists.
LISTED = 20


class ImageError(ValueError):
    """An image cannot be used; the message does not name it."""


def shown(name: str) -> str:
    """A file's name as a message may hold it: whatever a terminal would act on, and bytes that are no text, escaped.

    Example:
        >>> print(shown("crow\\x1b[2J.png"))
        crow\\x1b[2J.png
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def scan(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes of a folder, sorted, and its images: (path, class), class by class.

    Links to files and folders within ``root`` are followed, unless a folder would be met twice. Names that begin with
    a dot are passed over: what editors and file managers leave.

    Raises:
        ValueError: there is no class, a class has no image, a name is no text, or a link leads out of the folder, to
            nothing or back to where it lies; each is named.
    """
    real = os.path.realpath(root)
    problems: list[str] = []
    classes = sorted(entry.name for entry in _seen(root) if _is_folder(entry, real, problems))
    bad = [name for name in classes if shown(name) != name]
    if bad:
        raise ValueError(f"{shown(str(root))!r} has classes whose names are no plain text: {_few(bad)}; rename them")
    if not classes and not problems:
        raise ValueError(f"{shown(str(root))!r} has no classes; it must hold one folder a class, with images in it")
    samples: list[tuple[str, int]] = []
    empty = []
    for label, name in enumerate(classes):
        found = _images(os.path.join(root, name), real, problems)
        samples += [(path, label) for path in found]
        empty += [] if found else [name]
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        lines = "\n  ".join(problems[:LISTED])
        raise ValueError(
            f"{shown(str(root))!r} has links that are not followed; remove or replace them:\n  {lines}{more}"
        )
    if empty:
        raise ValueError(
            f"{shown(str(root))!r} cannot be used: there is no image in {_few(empty)}; known: {', '.join(SUFFIXES)}"
        )
    return tuple(classes), samples


def decode(path: str, size: int | None) -> NDArray[np.uint8]:
    """One image as :func:`plain` RGB of shape (height, width, 3), its size looked at before it is decoded.

    Args:
        path: the file.
        size: scale it so that its shorter side is this, and cut out its centre; None to take it as it is.

    Raises:
        ImageError: it cannot be read, or is too large.
    """
    from PIL import Image

    try:
        if not os.path.isfile(path):  # a pipe could block for ever
            raise ImageError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"it has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are decoded")
            if size is not None:
                scale = size / min(width, height)
                wide, high = (max(size, round(side * scale)) for side in (width, height))
                if wide * high > MAX_PIXELS:
                    raise ImageError(f"{width:,} x {height:,} resized to {wide:,} x {high:,} is too large; cut it")
            rgb = plain(image)
    except ImageError:
        raise
    except Exception as error:  # a decoder of any format, on any bytes
        raise ImageError(shown(" ".join(str(error).split()))[:300] or type(error).__name__) from error
    return np.asarray(resized(rgb, size))


def plain(image: Any) -> Any:
    """A Pillow image as a viewer shows it, in RGB: upright, 16 bits of grey as 8, what is transparent on white.

    Pillow's own conversion leaves a camera's image on its side, cuts 16 bits of grey off at 255, and shows whatever
    colour lies below what is transparent.

    Raises:
        ImageError: its numbers have no known black and white.
    """
    from PIL import Image, ImageOps

    kind, mode = image.format, image.mode
    if mode == "F" or (mode == "I" and kind not in ("PNG", "PPM")):
        numbers = "real numbers" if mode == "F" else "integers of 32 bits"
        raise ImageError(f"it holds {numbers}; save it in 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def resized(image: Any, size: int | None) -> Any:
    """A Pillow image, its shorter side scaled to ``size`` pixels, its centre cut out; None leaves it as it is."""
    if size is None:
        return image
    from PIL import Image

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _images(folder: str, root: str, problems: list[str]) -> list[str]:
    """The images at or below a folder, in the order of their paths; the names of files sort within a folder."""
    result: list[str] = []
    waiting, seen = [folder], set()
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place)
        if real in seen:
            problems.append(f"{shown(place)} leads to a folder that was read already")
            continue
        seen.add(real)
        entries = sorted(_seen(place), key=lambda entry: entry.name)
        below = [entry.path for entry in entries if _is_folder(entry, root, problems)]
        waiting += reversed(below)
        for entry in entries:
            if entry.path not in below and entry.name.lower().endswith(SUFFIXES) and _is_within(entry, root, problems):
                result.append(entry.path)
    return result


def _seen(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder and is not hidden."""
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]


def _is_folder(entry: os.DirEntry[str], root: str, problems: list[str]) -> bool:
    if not entry.is_dir():
        return False
    if not entry.is_symlink():
        return True
    target = os.path.realpath(entry.path)
    here = os.path.realpath(os.path.dirname(entry.path))
    if os.path.commonpath([target, here]) == target:
        problems.append(f"{shown(entry.path)} leads back to where it lies")
        return False
    return _is_within(entry, root, problems)


def _is_within(entry: os.DirEntry[str], root: str, problems: list[str]) -> bool:
    if not entry.is_symlink():
        return True
    target = os.path.realpath(entry.path)
    if not os.path.exists(target):
        problems.append(f"{shown(entry.path)} leads to nothing")
        return False
    if os.path.commonpath([target, root]) != root:
        problems.append(f"{shown(entry.path)} leads out of the folder, to {shown(target)}")
        return False
    return True


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(shown(name)) for name in names[:5]) + more
