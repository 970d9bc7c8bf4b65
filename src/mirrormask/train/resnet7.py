"""ResNet-7: what a quarter of an hour on two CPU cores brings to 85% on CIFAR-10."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirrormask import checks

__all__ = ["ResNet7", "resnet7"]


class Unit(nn.Module):
    """A convolution without bias, the largest of each ``pool`` x ``pool`` values, batch norm and ReLU."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1, pool: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(n_out)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, n_out, height / stride / pool, width / stride / pool)."""
        x = self.conv(x)
        if self.pool > 1:  # before the norm, which then sees a quarter of the values: a tenth of a step's time
            x = F.max_pool2d(x, self.pool)
        return F.relu(self.bn(x), inplace=True)


class ResNet7(nn.Module):
    """A stem of two convolutions, two stages, the largest value of each channel, a linear classifier.

    The ResNet-9 with which DAWNBench was won (Page, *How to train your ResNet*, 2018), narrower, with one convolution
    in each residual branch and with a stem of 4x4 and stride 2, so that all that follows sees a quarter of the pixels.

    Each stage is ``x ← unit(x)`` with pooling, ``x ← x + unit(x)``; the first has ``2 width`` channels, the second
    ``4 width``.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(Unit(channels, width, 4, 2), Unit(width, width))
        self.widen1, self.residual1 = Unit(width, 2 * width, pool=2), Unit(2 * width, 2 * width)
        self.widen2, self.residual2 = Unit(2 * width, 4 * width, pool=2), Unit(4 * width, 4 * width)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (batch, classes) for images of shape (batch, channels, height, width)."""
        x = self.widen1(self.stem(x))
        x = x + self.residual1(x)
        x = self.widen2(x)
        x = x + self.residual2(x)
        out: Tensor = self.fc(torch.amax(x, (2, 3)))
        return out


def resnet7(shape: tuple[int, ...], classes: int, *, width: int = 32) -> nn.Module:
    """ResNet-7 for images of 8x8 pixels or more: at width 32 and on CIFAR-10 288,512 weights, 17 million products."""
    if len(shape) != 3 or min(shape[1:]) < 8:
        size = "x".join(map(str, shape))
        raise ValueError(f"resnet7 takes images of channels x height x width, of 8x8 pixels or more, not {size}")
    return ResNet7(shape[0], classes, checks.check_int("width", width, low=1))
