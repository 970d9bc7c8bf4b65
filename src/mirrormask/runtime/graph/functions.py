"""Operations that a captured program has in place of PyTorch's own, as functions that PyTorch can run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "additive",
    "arrange",
    "attend",
    "attend_maps",
    "by_mean",
    "channel_norm",
    "compact",
    "features",
    "largest",
    "map_norm",
    "numbered",
    "per_channel",
    "pointwise",
    "product",
    "response",
    "shaped",
    "spaced",
    "spaced_conv",
    "stored",
]


def product(bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """``x W + b`` with a ``W`` of ``[inputs, outputs]``, for rows with any leading dimensions."""
    return F.linear(x, weight.T, bias)


def additive(mask: Tensor, strict: bool = False) -> Tensor:
    """What a mask adds to the scores, with ones for what it repeats: 0 and minus infinity of a boolean one.

    What the mask repeats is not written out.

    Args:
        strict: whether a query that sees no key is no number, as where a softmax is written out; else it is zero.
    """
    once = mask[tuple(slice(0, 1) if not step else slice(None) for step in mask.stride())]
    if once.dtype == torch.bool:
        once = torch.zeros(once.shape).masked_fill_(~once, -torch.inf)
    once = once.to(torch.float32)
    if strict:
        once = once.masked_fill((once == -torch.inf).all(-1, keepdim=True), torch.nan)
    whole = once.expand(mask.shape)
    return whole[(None,) * (4 - whole.dim())]


def compact(bias: Tensor) -> Tensor:
    """What ``[rows, heads, queries, keys]`` adds to scores: one row or head where all are alike, nothing for zeros."""
    if not bias.any():
        return torch.zeros(0)
    for dim in (0, 1):
        first = bias.narrow(dim, 0, 1)
        bias = first if torch.equal(first.expand_as(bias), bias) else bias
    return bias.contiguous().to(torch.float32)


def shaped(x: Tensor, shape: list[int]) -> Tensor:
    """The tensor itself, which has this shape.

    Raises:
        ValueError: it has another.
    """
    if list(x.shape) != shape:
        raise ValueError(f"a tensor of {list(x.shape)}, not {shape}")
    return x


def numbered(x: Tensor, numbers: list[int]) -> Tensor:
    """The tensor itself, which holds these numbers.

    Raises:
        ValueError: it holds others.
    """
    if x.tolist() != numbers:
        raise ValueError(f"a tensor of {x.tolist()}, not {numbers}")
    return x


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    width: tuple[int, int],
    scale: float,
    causal: bool,
) -> Tensor:
    """Attention of ``[batch, length, features]`` tensors, all heads' results one after the other.

    Args:
        mask: see :func:`additive`.
        starts: the first feature of each head in each of the three tensors.
        width: the features of a head of the query and of the value.
        causal: whether a token sees none that come after it.
    """
    heads = []
    for x, first, features in zip((query, key, value), starts, (width[0], *width), strict=True):
        heads.append(torch.stack([x[..., start : start + features] for start in first], 1))
    q, k, v = heads
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return result.transpose(1, 2).flatten(2)


def features(x: Tensor, order: tuple[int, ...], signs: tuple[float, ...]) -> Tensor:
    """Some features of rows in another order, multiplied with 1 or -1 each if ``signs`` says which."""
    taken = x[..., torch.tensor(order)]
    return taken * torch.tensor(signs) if signs else taken


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer over the channels of ``[batch, channels, height, width]``."""
    return F.conv2d(x, weight[:, :, None, None], bias)


def channel_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str = "layer") -> Tensor:
    """A layer norm, or one of the kind ``"rms"``, over the channels of ``[batch, channels, height, width]``."""
    if kind == "rms":
        made = F.rms_norm(x.movedim(1, -1), (x.shape[1],), weight, eps)
        return (made if bias is None else made + bias).movedim(-1, 1)
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, eps).movedim(-1, 1)


def largest(x: Tensor, size: list[int]) -> Tensor:
    """The adaptive maximum without its places, which ATen gives only together."""
    return F.adaptive_max_pool2d(x, size)


def map_norm(x: Tensor) -> Tensor:
    """The root of the sum of all squares of a map, ``[batch, channels, 1, 1]``."""
    made: Tensor = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return made


def by_mean(x: Tensor, eps: float) -> Tensor:
    """Each channel over the mean of all."""
    return x / (x.mean(1, keepdim=True) + eps)


def response(x: Tensor, eps: float, last: bool) -> Tensor:
    """Maps times their :func:`map_norm` :func:`by_mean`, channels at the end if ``last``: arXiv 2301.00808."""
    if last:
        return response(x.movedim(-1, 1), eps, False).movedim(1, -1)
    return x * by_mean(map_norm(x), eps)


def arrange(x: Tensor, first: tuple[int, ...], second: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Numbers of each item in other places: ``out[c, p] = x[first[c] + second[p]]``, and 0 where ``second`` is less.

    Args:
        x: ``[batch, ...]``; places count an item's numbers one after the other.
        size: of a map of the result, ``(height, width)``, ``(width,)``, or ``()`` for one number per channel.
    """
    places = torch.tensor(first)[:, None] + torch.tensor(second).clamp(min=0)
    found = x.flatten(1)[:, places.reshape(-1)].reshape(len(x), len(first), len(second))
    found = found.masked_fill(torch.tensor(second) < 0, 0.0)
    return found.reshape(len(x), len(first), *size)


def stored(
    like: Tensor, numbers: Tensor, first: tuple[int, ...], second: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    """:func:`arrange` of stored numbers, the same for every item of ``like``."""
    once = arrange(numbers.reshape(1, -1), first, second, size)
    return once.expand(len(like), *once.shape[1:])


def per_channel(x: Tensor, numbers: Tensor, kind: str) -> Tensor:
    """``x`` with one stored number for each channel: ``kind`` is ``mul``, ``div``, ``add``, ``sub`` or ``rsub``.

    Of frames, see :mod:`graph.frames`, the channels of each.
    """
    times = max(1, x.shape[1] // numbers.numel()) if numbers.numel() > 1 else 1
    made: Tensor = getattr(torch, kind)(x, numbers.reshape(-1).repeat(times).reshape(1, -1, *[1] * (x.dim() - 2)))
    return made


def attend_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    width: tuple[int, int],
    scale: float,
    causal: bool,
) -> Tensor:
    """Attention between the columns of maps ``[batch, channels, rows, columns]``, each row by itself.

    Args:
        bias: added to the scores: ``[rows or 1, heads or 1, queries, keys]``.
        starts, width: as :func:`attend` has them, of channels.
    """
    heads = []
    for x, first, features in zip((query, key, value), starts, (width[0], *width), strict=True):
        heads.append(torch.stack([x[:, start : start + features].permute(0, 2, 3, 1) for start in first], 2))
    q, k, v = heads  # [batch, rows, heads, columns, features]
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return result.permute(0, 2, 4, 1, 3).flatten(1, 2)


def spaced(x: Tensor, stride: tuple[int, int], around: tuple[int, int, int, int]) -> Tensor:
    """Maps with ``stride - 1`` zeros between their numbers, and so many more left, right, above and below.

    A sequence of numbers is a map of one row.
    """
    if x.dim() == 3:
        return spaced(x[:, :, None], stride, around)[:, :, 0]
    rows, columns = x.shape[2], x.shape[3]
    made = x.new_zeros(*x.shape[:2], (rows - 1) * stride[0] + 1, (columns - 1) * stride[1] + 1)
    made[:, :, :: stride[0], :: stride[1]] = x
    return F.pad(made, around)


def spaced_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], groups: int) -> Tensor:
    """The convolution that a transposed one is of :func:`spaced` maps: ``weight`` is ``[inputs, outputs, ...]``."""
    if x.dim() == 3:
        return spaced_conv(x[:, :, None], weight[:, :, None], bias, dilation, groups)[:, :, 0]
    inputs, outputs = weight.shape[:2]
    parts = weight.reshape(groups, inputs // groups, outputs, *weight.shape[2:]).transpose(1, 2)
    turned = parts.reshape(groups * outputs, inputs // groups, *weight.shape[2:]).flip(-1, -2)
    return F.conv2d(x, turned, bias, dilation=dilation, groups=groups)
