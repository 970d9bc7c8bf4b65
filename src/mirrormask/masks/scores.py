"""How much a weight matters, judged by the weight alone: one function a score; larger stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mirrormask.checks import check_known
from mirrormask.masks.keys import CHUNK, by_numpy
from mirrormask.masks.saliency import DATA_SCORES

__all__ = ["DRAWING", "SCORES", "balanced", "check_score", "lamp", "lamp_shares", "magnitude", "random", "sensitivity"]


def magnitude(x: Tensor, generator: torch.Generator) -> Tensor:
    """``|x|``; NaN would compare with nothing, so it counts as infinity and the step that made it stays visible."""
    return x.detach().abs().nan_to_num_(nan=float("inf"), posinf=float("inf"))


def lamp(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x² / Σ {y² : |y| ≥ |x|}`` over the weight's own tensor: magnitude that no scale of a layer changes.

    The largest weight of every layer has the score 1, hence no layer is emptied while as many weights stay as there are
    layers. Of equal magnitudes the first by index has the larger score, as it is the first to stay.

    Args:
        x: any shape.
        generator: not read.

    Example:
        >>> lamp(torch.tensor([[1.0, 2.0], [0.0, -2.0]]), torch.Generator()).tolist()
        [[0.1111111119389534, 1.0], [0.0, 0.5]]

    Source: Lee, Park, Mo, Ahn and Shin 2021, arXiv 2010.07611, equation (4).
    """
    scores = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    flat, total = scores.view(-1), torch.zeros(1, dtype=torch.float64, device=x.device)
    for sizes, places in _descending(magnitude(x, generator).reshape(-1)):
        squares = sizes.double().square_()
        shares, total = lamp_shares(squares, total)
        shares.nan_to_num_(nan=0.0)
        if total.isinf().any():
            shares.masked_fill_(squares.isinf(), 2.0)
        flat.scatter_(0, places, shares.float())
    return scores


def lamp_shares(squares: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of some squares, from the largest to the smallest, in float64, and the sum that the last one is of.

    Args:
        squares: consecutive ones of a tensor, at least one.
        above: the sum of those before, of shape (1,).
    """
    sums = squares.clone()
    sums[:1] += above
    sums.cumsum_(0)
    return squares / sums, sums[-1:]


def _descending(sizes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What is not negative, from the largest to the smallest, equal ones by index; in chunks, with their indices."""
    if sizes.dtype == torch.float64 or sizes.numel() > 2**32:
        values, places = sizes.sort(descending=True, stable=True)
        yield from zip(torch.split(values, CHUNK), torch.split(places, CHUNK), strict=True)
        return
    # One number of 64 bits for each, minus the size's bits above its index, is sorted in place: a third of the memory
    # of a sort that returns indices, and by numpy a seventh of its time.
    packed = torch.empty(len(sizes), dtype=torch.int64, device=sizes.device)
    parts, start = torch.split(packed, CHUNK), 0
    for part, chunk in zip(parts, torch.split(sizes, CHUNK), strict=True):
        places = torch.arange(start, start + len(part), device=part.device)
        torch.sub(places, chunk.float().view(torch.int32), alpha=2**32, out=part)
        start += len(part)
    if by_numpy(packed):
        packed.numpy().sort()
    else:
        parts = torch.split(packed.sort().values, CHUNK)
    for part in parts:
        yield (part >> 32).neg_().int().view(torch.float32), part & (2**32 - 1)


def random(x: Tensor, generator: torch.Generator) -> Tensor:
    """A number drawn from [0, 1) for each weight, from a generator in CPU memory."""
    return torch.rand(x.shape, generator=generator).to(x.device)


def sensitivity(x: Tensor, generator: torch.Generator) -> Tensor:
    """``|x| rms(∇f)``, the root mean square of the gradient taken over the weights of the same output.

    To first order, what removing a weight of this size does to the loss, on average over its output (a row, or a filter
    of a convolution). An output in front of a batch norm may have any scale: its gradient is the smaller, the larger it
    is, and this score is the same. Without a gradient that is a number it is the magnitude.

    Args:
        x: any shape, outputs first; its ``grad`` is read.
        generator: not read.

    Example:
        >>> x = torch.tensor([[0.5, -2.0], [1.0, 1.0]])
        >>> x.grad = torch.tensor([[4.0, 4.0], [1.0, -1.0]])
        >>> sensitivity(x, torch.Generator()).tolist()
        [[2.0, 8.0], [1.0, 1.0]]

    Source: this library; a product of weight and gradient, as in Molchanov et al. 2017, arXiv 1611.06440, with the
    gradient averaged, as a single batch says little of a single weight.
    """
    score = magnitude(x, generator)
    if x.grad is not None and x.dim() > 1 and x.numel():
        gradient = x.grad.double().square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt()
        score = score * gradient.to(score.dtype) if gradient.isfinite().all() else score
    return score


def balanced(x: Tensor, generator: torch.Generator, grown: float = 0.0, full: Tensor | None = None) -> Tensor:
    """``|x| rms(∇f)^((1 + grown) / 2)``: from halfway between :func:`magnitude` and :func:`sensitivity` to the latter.

    How large a weight is says how much it matters as far as the optimizer that made it moved it by its gradient. SGD
    did so, Adam did not, and who trained a network that is fine-tuned does not show in its weights: halfway is close to
    the better of the two in both cases (docs/studies.md). What this training has made of small random weights, under
    Adam, is known to tell nothing, so that there the gradient counts in full.

    Args:
        x: any shape, outputs first; its ``grad`` is read.
        generator: not read.
        grown: the share of the network that has outgrown its start, in [0, 1], as a decay that watches it finds it
            (``ShrinkDecay``); 0 under any other.
        full: the :func:`sensitivity`, where it is known already; it is written over.

    Example:
        >>> x = torch.tensor([[0.5, -2.0], [1.0, 1.0]])
        >>> x.grad = torch.tensor([[4.0, 4.0], [1.0, -1.0]])
        >>> balanced(x, torch.Generator()).round(decimals=4).tolist()
        [[1.0, 4.0], [1.0, 1.0]]

    Source: this library; a geometric mean of two scores.
    """
    full = sensitivity(x, generator) if full is None else full
    if grown >= 1:
        return full
    share = (1 + grown) / 2
    return full.pow_(share).mul_(magnitude(x, generator).pow_(1 - share))


#: The scores that read their generator.
DRAWING = ("random",)
#: Scores of a weight as it is, by name; those that need data are in :mod:`mirrormask.masks.saliency`.
SCORES: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "balanced": balanced,
    "lamp": lamp,
    "magnitude": magnitude,
    "random": random,
    "sensitivity": sensitivity,
}


def check_score(name: str) -> str:
    """Return ``name`` if it names a score, else raise a ValueError that lists the known ones."""
    return check_known("score", name, [*SCORES, *DATA_SCORES])
