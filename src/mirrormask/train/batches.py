"""Batches from images in memory: order, augmentation and normalisation, on whole tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mirrormask.train.data import Images

__all__ = ["Batches", "augment"]


def augment(x: Tensor, *, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``crop`` pixels each way (zeros come in) and, half of the time, mirrored.

    Args:
        x: images of shape (n, channels, height, width).
        crop: pixels of padding on each side before an image of the old size is cut out.
        flip: whether to mirror.
        generator: a CPU generator.

    Returns:
        A tensor like ``x``.
    """
    n, _, height, width = x.shape
    rows = torch.arange(height).expand(n, height)
    columns = torch.arange(width).expand(n, width)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if crop:
        x = F.pad(x, (crop,) * 4)
        rows = rows + torch.randint(0, 2 * crop + 1, (n, 1), generator=generator)
        columns = columns + torch.randint(0, 2 * crop + 1, (n, 1), generator=generator)
    rows, columns = rows.to(x.device), columns.to(x.device)
    image = torch.arange(n, device=x.device)
    # Indices on both sides of the channels' slice move the slice last; permute puts it back.
    return x[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Batches:
    """The batches of one split, normalised per channel.

    Each process holds the whole split and takes its share of every batch, so that the order does not depend on
    the number of processes.

    Args:
        images: the split.
        mean, std: per channel, of shape (channels, 1, 1).
        size: images a batch, over all processes together.
        device: where batches go.
        rank, world: this process and their number; ``world`` must divide ``size``.
        crop, flip: see :func:`augment`; only used by :meth:`shuffled`.
        channels_last: lay batches out with channels innermost, in which convolutions are faster.
    """

    def __init__(
        self,
        images: Images,
        mean: Tensor,
        std: Tensor,
        size: int,
        *,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        crop: int = 0,
        flip: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.images, self.size, self.rank, self.world = images, size, rank, world
        self.crop, self.flip, self.device = crop, flip, device
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self._shift, self._scale = (-mean / std).to(device), (1.0 / std).to(device)

    def __len__(self) -> int:
        """The number of full batches."""
        return len(self.images) // self.size

    def shuffled(
        self, generator: torch.Generator, *, skip: int = 0, state: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in an order from ``generator``, augmented; an incomplete last batch is left out.

        Args:
            generator: on the CPU; between two batches, its state is what the rest of the epoch is drawn from.
            skip: how many batches of this order were had before.
            state: of the generator after them.
        """
        order = torch.randperm(len(self.images), generator=generator)
        if state is not None:
            generator.set_state(state)
        for start in range(skip * self.size, len(self) * self.size, self.size):
            index = order[start : start + self.size]
            # Every process draws the augmentation of the whole batch, so that all generators stay together.
            x = self.images.x[index]
            if self.crop or self.flip:
                x = augment(x, crop=self.crop, flip=self.flip, generator=generator)
            yield self._ready(x[self.rank :: self.world], self.images.y[index[self.rank :: self.world]])

    def in_order(self, *, together: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of this process's share once, without augmentation.

        Args:
            together: give every process as many batches, so that models whose forward needs all of them can be
                called; one that runs out gets an image without a label.
        """
        share, size = torch.arange(self.rank, len(self.images), self.world), max(self.size, 256)
        for index in torch.split(share, size):
            if len(index):
                yield self._ready(self.images.x[index], self.images.y[index])
        most = -(-len(self.images) // self.world)
        if together and -(-len(share) // size) < -(-most // size):
            yield self._ready(self.images.x[:1], self.images.y[:0])

    def _ready(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.device, non_blocking=True).to(torch.float32, memory_format=self.layout)
        return torch.addcmul(self._shift, x, self._scale), y.to(self.device, non_blocking=True)
