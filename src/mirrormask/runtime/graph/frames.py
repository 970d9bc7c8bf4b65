"""Volumes ``[batch, channels, depth, height, width]`` as maps whose channels are those of one frame after another.

Then a convolution over volumes reads, for each frame of its result, the channels of some neighbouring frames: one over
maps, of the same weights wherever the same taps meet a frame. These are the operations of a captured program that say
so, as functions that PyTorch can run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["as_frames", "as_volume", "channels_of", "frames_conv", "frames_norm", "taps_of"]


def as_frames(x: Tensor) -> Tensor:
    """``[batch, channels, depth, height, width]`` as ``[batch, depth * channels, height, width]``."""
    return x.transpose(1, 2).flatten(1, 2)


def as_volume(x: Tensor, depth: int) -> Tensor:
    """The volume that :func:`as_frames` was given."""
    batch, _, *size = x.shape
    return x.reshape(batch, depth, -1, *size).transpose(1, 2).contiguous()


def channels_of(x: Tensor, order: tuple[int, ...], gains: tuple[float, ...]) -> Tensor:
    """Some channels, in this order, multiplied with a number each if there are ``gains``."""
    taken = x[:, torch.tensor(order)]
    return taken * torch.tensor(gains).reshape(-1, *[1] * (x.dim() - 2)) if gains else taken


def frames_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    frames: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    turned: bool,
) -> Tensor:
    """A convolution over volumes, of frames.

    Args:
        weight: ``[outputs, inputs / groups, depth, height, width]``; ``[inputs, outputs / groups, ...]`` if ``turned``.
        frames: for each frame of the result and each tap in depth, the frame that it reads; -1 for none.
        turned: whether it is the one that a transposed one is of spaced maps.
    """
    if turned:
        inputs, outputs, *kernel = weight.shape
        parts = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
        weight = parts.reshape(groups * outputs, inputs // groups, *kernel).flip(-1, -2)
    taps, wide = weight.shape[2], weight.shape[1] * groups
    made = []
    for first in range(0, len(frames), taps):
        row = list(enumerate(frames[first : first + taps]))
        total = sum(
            F.conv2d(x[:, i * wide : (i + 1) * wide], weight[:, :, k], None, stride, padding, dilation, groups)
            for k, i in row
            if i >= 0
        )
        if not isinstance(total, Tensor):  # zeros between the frames of a transposed one, and around
            total = F.conv2d(x[:, :wide], torch.zeros_like(weight[:, :, 0]), None, stride, padding, dilation, groups)
        made.append(total if bias is None else total + bias.reshape(-1, 1, 1))
    return torch.cat(made, 1)


def frames_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """A batch norm by stored statistics, the same for each frame."""
    frames = x.reshape(-1, len(mean), *x.shape[2:])
    return F.batch_norm(frames, mean, variance, weight, bias, eps=eps).reshape(x.shape)


def taps_of(
    depth: int, made: int, taps: int, stride: int, padding: int, dilation: int, *, transposed: bool = False
) -> tuple[int, ...]:
    """The ``frames`` of :func:`frames_conv`, for ``depth`` frames of which ``made`` are made.

    Example:
        >>> taps_of(3, 3, 3, 1, 1, 1)
        (-1, 0, 1, 0, 1, 2, 1, 2, -1)
        >>> taps_of(2, 4, 2, 2, 0, 1, transposed=True)
        (0, -1, -1, 0, 1, -1, -1, 1)
    """
    found = []
    for out in range(made):
        for tap in range(taps):
            if transposed:
                frame, rest = divmod(out + padding - tap * dilation, stride)
                frame = -1 if rest else frame
            else:
                frame = out * stride - padding + tap * dilation
            found.append(frame if 0 <= frame < depth else -1)
    return tuple(found)
