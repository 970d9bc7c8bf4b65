"""SparseOpt: gradients that a normalisation has skewed towards neurons of few inputs, scaled back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.corrections.base import Correction
from mirrormask.progress import Clock

__all__ = ["NeuronScale", "neuron_scales"]


def neuron_scales(alive: Tensor) -> Tensor:
    """``sqrt((1 - s_i) / (1 - s_mean))`` of each neuron, whose sparsity is s_i.

    Args:
        alive: bool, outputs first: which of the weights into each neuron live.

    Returns:
        Float64, one number a neuron, shaped to be multiplied with a weight; 1 where the mask leaves nothing at all.

    Example:
        >>> neuron_scales(torch.tensor([[True, True, True, True], [True, False, False, False]])).flatten().tolist()
        [1.2649110640673518, 0.6324555320336759]
    """
    shares = alive.flatten(1).sum(1).double() / math.prod(alive.shape[1:])
    mean = shares.mean()
    scales = torch.where(mean > 0, (shares / mean).sqrt_(), torch.ones_like(shares))
    return scales.view(-1, *[1] * (alive.dim() - 1))


@dataclass(frozen=True)
class NeuronScale(Correction):
    """``∂x_i ← ∂x_i sqrt((1 - s_i) / (1 - s_mean))`` for the weights into neuron i, before the optimizer's step.

    A neuron of which the mask removes the share ``s_i`` of its inputs sums ``1 - s_i`` of the variance, and the batch
    norm behind it multiplies its gradient by ``1 / sqrt(1 - s_i)``. Neurons of one layer differ in this, so that the
    gradient of the layer points elsewhere, and jumps whenever a mask changes. The scale takes that back, and leaves
    the size of the layer's gradient about as it is. A layer that is dense, or whose neurons are all equally sparse,
    trains as ever.

    Args:
        then: what follows the optimizer's step, such as :class:`mirrormask.corrections.Hyperbolic`; it is given the
            scaled gradients. None for nothing.

    Raises:
        TypeError: ``then`` is no correction.
        ValueError: ``then`` changes gradients itself.

    Example:
        >>> x, mask = torch.ones(2, 2), torch.tensor([[True, True], [True, False]])
        >>> (grad,) = NeuronScale().gradients([torch.ones(2, 2)], [x], [mask])
        >>> grad.double().round(decimals=4)[:, 0].tolist()
        [1.1547, 0.8165]

    Source: Adnan, Jain, Jacobs, Sharma, Krishnan, Burkholz and Ioannou 2026 (ICML), arXiv 2605.27541, the update rule
    ``w ← w - η (1 - s_avg)^(-1/2) D ∇L(w)``, ``D = diag(sqrt(1 - s_i))``.

    Differs from the paper: we know its update from the abstract and its authors' account of it, and read the rest so:
    every weight of two dimensions and more is scaled, with a batch norm behind it or not, since an optimizer does not
    see what follows a weight; ``s_avg`` is the mean over the layer's neurons; the scaled gradient is what momentum and
    weight decay are added to; before there is a mask, what is zero counts as removed.
    """

    then: Correction | None = None

    rescales: ClassVar[bool] = True
    by_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.then is not None and not isinstance(self.then, Correction):
            raise TypeError(f"then={self.then!r} is a {type(self.then).__name__}, not a Correction")
        if self.then is not None and self.then.rescales:
            raise ValueError(f"then={self.then!r} changes gradients itself; give a step that follows the optimizer's")

    def active(self, clock: Clock) -> bool:
        """Where ``then`` is."""
        return self.then is not None and self.then.active(clock)

    def gradients(self, grads: Sequence[Tensor], x: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """Those of each neuron times its scale."""
        found = []
        for grad, weight, mask in zip(grads, x, masks, strict=True):
            if grad.dim() < 2 or not grad.numel():
                found.append(grad)
                continue
            scales = neuron_scales(weight != 0 if mask is None else mask)
            found.append(grad * scales.to(grad.dtype))
        return found

    def prepare(self, grads: list[Tensor], lr: float) -> list[Tensor]:
        """What ``then`` needs."""
        return [] if self.then is None else self.then.prepare(grads, lr)

    def apply(self, theta: list[Tensor], prepared: list[Tensor], lr: float) -> None:
        """``then``."""
        if self.then is not None:
            self.then.apply(theta, prepared, lr)
