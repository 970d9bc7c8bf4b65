"""The ordinary weight: x = θ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mirrormask.geometry.base import Geometry, Latents

__all__ = ["Euclidean"]


@dataclass(frozen=True)
class Euclidean(Geometry):
    """``x = θ``: the base optimizer trains the weight itself, its weight decay included.

    Example:
        >>> Euclidean().latents
        ()
    """

    shards: ClassVar[bool] = True

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """No latents: θ is x itself."""
        return {}

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """Nothing to pull back: the gradient of θ is that of x."""
        return {}

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """Nothing to push: θ is x."""
