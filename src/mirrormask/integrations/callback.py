"""What a callback is, whatever its trainer: the arguments of ``mm.sparsify``, and the optimizer once there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from mirrormask.integrations.wrapping import Wrapping
from mirrormask.masks.saliency import Loss
from mirrormask.methods import Method
from mirrormask.optimizer import SparseOptimizer
from mirrormask.selection import Weights

__all__ = ["Sparsifying"]


class Sparsifying:
    """The part of a callback that knows no trainer; a subclass is also its trainer's kind of callback.

    Args:
        method, weights, score, batches, loss_fn, fused, on_empty: as in :class:`Wrapping`.

    Raises:
        TypeError, ValueError: as :class:`Wrapping`.
    """

    #: What begins a training, for the error of who asks too early.
    begins: ClassVar[str]

    def __init__(
        self,
        method: Method,
        *,
        weights: Weights | None = None,
        score: Callable[[], float] | None = None,
        batches: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        fused: bool = True,
        on_empty: str = "warn",
    ) -> None:
        self.wrapping = Wrapping(method, weights, None, score, batches, loss_fn, fused, on_empty)
        self._optimizer: SparseOptimizer | None = None
        self._print = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.wrapping.method.name!r}, sparsity={self.wrapping.method.sparsity:g})"

    @property
    def optimizer(self) -> SparseOptimizer:
        """The optimizer that trains: its ``masks``, its ``diagnostics()``.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._optimizer is None:
            raise RuntimeError(f"there is no optimizer before {self.begins} has begun")
        return self._optimizer

    def _for_steps(self, steps: int | None) -> None:
        """The training will have so many steps; None to ask the trainer."""
        self.wrapping = dataclasses.replace(self.wrapping, steps=steps)
