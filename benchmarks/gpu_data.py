"""CIFAR-10 as one small file that travels to a machine with a GPU, and its images on the device.

The folder's 60,000 JPEG files begin with the same 609 bytes, which are kept once: 20 MB instead of 55, with every pixel
as it is (decoded, they would be 184 MB). A file of raw uint8 arrays `x`, `y`, `train` is read too.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES = 10


class Images(NamedTuple):
    """Images on a device, float32 with zero mean and unit variance a channel, and their classes."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def pack(folder: Path, path: Path) -> None:
    """Write the JPEG files of ``folder/train/CLASS`` and ``folder/test/CLASS`` into one file."""
    files: list[tuple[Path, int, bool]] = []
    for part in ("train", "test"):
        for label, own in enumerate(sorted(p for p in (folder / part).iterdir() if p.is_dir())):
            files += [(image, label, part == "train") for image in sorted(own.iterdir())]
    raw = [image.read_bytes() for image, _, _ in files]
    head = raw[0][: raw[0].index(b"\xff\xda")]
    if not all(data.startswith(head) for data in raw):
        raise ValueError(f"the JPEG files of {folder} do not begin alike; pack decoded images x, y, train instead")
    bodies = [data[len(head) :] for data in raw]
    np.savez(
        path,
        head=np.frombuffer(head, np.uint8),
        body=np.frombuffer(b"".join(bodies), np.uint8),
        ends=np.cumsum([len(body) for body in bodies]),
        y=np.array([label for _, label, _ in files], np.uint8),
        train=np.array([train for _, _, train in files]),
    )


def load(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """All images (uint8, channels innermost), their classes, and which are for training."""
    held = np.load(path)
    if "x" in held:
        x = held["x"]
    else:
        from PIL import Image

        head, body, ends = held["head"].tobytes(), held["body"].tobytes(), held["ends"].tolist()
        starts = [0, *ends[:-1]]

        def decode(i: int) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(head + body[starts[i] : ends[i]])).convert("RGB"))

        with ThreadPoolExecutor(8) as pool:
            x = np.stack(list(pool.map(decode, range(len(ends)), chunksize=1000)))
    return torch.from_numpy(x), torch.from_numpy(held["y"]).long(), torch.from_numpy(held["train"])


def unpack(packed: Path, path: Path) -> None:
    """Write the decoded images, 184 MB, which many processes read in a moment."""
    x, y, train = load(packed)
    np.savez(path, x=x.numpy(), y=y.numpy(), train=train.numpy())


def noise(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of nothing, where the script itself is tried."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (number, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return x, torch.randint(0, CLASSES, (number,), generator=generator), torch.arange(number) < number // 2


def ready(x: Tensor, y: Tensor, train: Tensor, device: torch.device) -> Images:
    """Normalised by the training images' statistics, in channels_last, on the device."""
    x, y, train = x.to(device).permute(0, 3, 1, 2).float(), y.to(device), train.to(device)
    std, mean = torch.std_mean(x[train], (0, 2, 3), keepdim=True)
    x = (x - mean) / std
    return Images(x[train], y[train], x[~train], y[~train])


def augmented(x: Tensor, pad: int = 4) -> Tensor:
    """Each image shifted by up to ``pad`` pixels, zeros coming in, and mirrored half of the time."""
    n, _, height, width = x.shape
    at, device = torch.arange(n, device=x.device)[:, None, None], x.device
    rows = torch.arange(height, device=device) + torch.randint(0, 2 * pad + 1, (n, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(0, 2 * pad + 1, (n, 1), device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns, columns.flip(1))
    padded = torch.nn.functional.pad(x, (pad,) * 4).permute(0, 2, 3, 1)
    return padded[at, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
