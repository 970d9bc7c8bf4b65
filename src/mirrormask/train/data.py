"""The data sets that recipes name, as uint8 tensors in memory."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirrormask import checks
from mirrormask.train import folder, named, saved_dataset
from mirrormask.train.recipe import Data

__all__ = ["Images", "Splits", "load"]

#: The validation split and digits' test split are the same in every run, whatever its seed.
SPLIT_SEED = 20240816


@dataclass(frozen=True)
class Images:
    """Images ``x``, uint8 of shape (n, channels, height, width), and their classes ``y``, int64 of shape (n,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Images:
        """The images at ``index``, in that order."""
        return Images(self.x[index], self.y[index])


@dataclass(frozen=True)
class Splits:
    """A data set: what to train on, what to test on, and, if one was asked for, what to tune on.

    Raises:
        TypeError: images or labels are of another kind than :class:`Images` has.
        ValueError: there are none, images are of several shapes, or a label is the place of no class.
    """

    train: Images
    test: Images
    validation: Images | None
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("train", "test", "validation"):
            part: Images | None = getattr(self, name)
            if part is None:
                continue
            if part.x.dtype != torch.uint8 or part.x.dim() != 4 or part.y.dtype != torch.int64:
                raise TypeError(
                    f"{name} holds x of {part.x.dtype}, {tuple(part.x.shape)} and y of {part.y.dtype}; x is uint8 of "
                    "(n, channels, height, width), and y int64 of (n,)"
                )
            if not len(part) or part.y.shape != part.x.shape[:1] or tuple(part.x.shape[1:]) != self.shape:
                raise ValueError(
                    f"{name} holds {tuple(part.x.shape)} images and {tuple(part.y.shape)} labels; there must be one "
                    f"for each, at least one, and all images of {self.shape} as to train on"
                )
            odd = sorted({int(part.y.min()), int(part.y.max())} - set(range(len(self.classes))))
            if odd:
                raise ValueError(f"{name} holds the label {odd[0]}, and there are {len(self.classes)} classes, from 0")

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train.x.shape[1:])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all images, labels and classes, in their order."""
        found = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for part in (self.train, self.test, *([self.validation] if self.validation else [])):
            for tensor in (part.x, part.y):
                found.update(f"\0{tensor.dtype} {tuple(tensor.shape)}\0".encode())
                found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over the training images, float32 of shape (channels, 1, 1)."""
        values = torch.arange(256, dtype=torch.float64)
        means, deviations = [], []
        for channel in self.train.x.unbind(1):
            # Counting values is exact, and needs no float copy of the data set.
            weights = torch.bincount(channel.reshape(-1), minlength=256).double()
            weights /= weights.sum()
            mean = (weights * values).sum()
            means.append(mean)
            deviations.append((weights * (values - mean) ** 2).sum().sqrt())
        deviation = torch.stack(deviations)
        deviation[deviation == 0] = 1.0
        return torch.stack(means).float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)


def load(data: Data) -> Splits:
    """Read the data set that ``data`` names.

    Raises:
        ValueError: it is not where ``data.root`` says, a folder's images cannot be used (each is named), or the
            validation split would leave nothing to train on.
    """
    if data.name.startswith("folder:"):
        train, test, classes = folder.load(Path(data.name.removeprefix("folder:")), data.size)
        splits = Splits(Images(*train), Images(*test), None, classes)
    elif data.name.startswith("datasets:"):
        train, test, classes = saved_dataset.load(Path(data.name.removeprefix("datasets:")), data.size)
        splits = Splits(Images(*train), Images(*test), None, classes)
    elif named.is_code(data.name):
        splits = _own(data.name)
    elif data.name == "digits":
        splits = _digits()
    else:
        splits = _torchvision(data)
    if data.channels == 3 and splits.shape[0] == 1:
        splits = Splits(_repeat(splits.train), _repeat(splits.test), None, splits.classes)
    elif data.channels not in (None, splits.shape[0]):
        raise ValueError(f"data.channels={data.channels}, but {data.name!r} has {splits.shape[0]}; leave it out")
    return _hold_out(splits, data.validation) if data.validation else splits


def _digits() -> Splits:
    datasets = checks.require("sklearn.datasets", "train", "the data set 'digits'")
    digits = datasets.load_digits()
    x = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(digits.target).long()
    # A fifth of each class is for testing, so that 360 images stand for all ten digits alike.
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(y), generator=generator)
    test = torch.cat([_fifth(order[y[order] == label]) for label in range(10)])
    is_test = torch.zeros(len(y), dtype=torch.bool).index_fill_(0, test, True)
    whole = Images(x, y)
    names = tuple(str(label) for label in range(10))
    return Splits(whole.take(torch.where(~is_test)[0]), whole.take(torch.where(is_test)[0]), None, names)


def _own(name: str) -> Splits:
    """What a function of the user's returns: splits, or images and labels to train and to test on."""
    function = named.fetch(name)
    if not callable(function):
        raise TypeError(f"{name!r} is a {type(function).__name__}, not a function that returns the data")
    found = function()
    if isinstance(found, Splits):
        return found
    hint = (
        "return ((train x, train y), (test x, test y)), with x uint8 of (n, channels, height, width), y int64 of (n,)"
    )
    try:
        (train_x, train_y), (test_x, test_y) = found
        pairs = [
            (torch.as_tensor(train_x), torch.as_tensor(train_y)),
            (torch.as_tensor(test_x), torch.as_tensor(test_y)),
        ]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name!r} returned a {type(found).__name__}; {hint}") from error
    for x, y in pairs:
        if x.dtype != torch.uint8 or x.dim() != 4 or y.shape != x.shape[:1] or y.is_floating_point() or not len(y):
            raise TypeError(
                f"{name!r} returned x of {x.dtype}, {tuple(x.shape)} and y of {y.dtype}, {tuple(y.shape)}; {hint}"
            )
    if pairs[0][0].shape[1:] != pairs[1][0].shape[1:]:
        raise ValueError(
            f"{name!r} returned images of {tuple(pairs[0][0].shape[1:])} and {tuple(pairs[1][0].shape[1:])}"
        )
    lowest, highest = (int(op(torch.stack([op(y) for _, y in pairs]))) for op in (torch.min, torch.max))
    if lowest < 0:
        raise ValueError(f"{name!r} returned the label {lowest}; classes are counted from 0")
    unseen = sorted(set(pairs[1][1].tolist()) - set(pairs[0][1].tolist()))
    if unseen:
        raise ValueError(f"{name!r} returned images to test on of classes that none to train on is of: {unseen[:10]}")
    names = tuple(str(label) for label in range(highest + 1))
    train, test = (Images(x, y.long()) for x, y in pairs)
    return Splits(train, test, None, names)


def _fifth(index: Tensor) -> Tensor:
    return index[: len(index) // 5]


def _torchvision(data: Data) -> Splits:
    datasets = checks.require("torchvision.datasets", "train", f"the data set {data.name!r}")
    make = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[
        data.name
    ]
    try:
        parts = [make(data.root, train=train, download=data.download) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"{data.name!r} is not in data.root={data.root!r} ({Path(data.root).resolve()}): {error}; "
            "give the folder with --data.root DIR, or let it be downloaded with --data.download true"
        ) from error
    return Splits(_images(parts[0]), _images(parts[1]), None, tuple(parts[0].classes))


def _images(part: Any) -> Images:
    x = torch.as_tensor(part.data)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return Images(x.contiguous(), torch.as_tensor(part.targets).long())


def _repeat(images: Images) -> Images:
    return Images(images.x.repeat(1, 3, 1, 1), images.y)


def _hold_out(splits: Splits, n: int) -> Splits:
    if n >= len(splits.train):
        raise ValueError(f"data.validation={n} leaves none of the {len(splits.train)} training images to train on")
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    kept = order[n:].sort().values
    return Splits(splits.train.take(kept), splits.test, splits.train.take(order[:n].sort().values), splits.classes)
