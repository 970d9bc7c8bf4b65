"""SGD on the parameters that the base optimizer trains itself: biases, the scales of normalisation."""

from __future__ import annotations

from typing import ClassVar

from mirrormask.geometry import Euclidean
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.steps.base import Now
from mirrormask.optimizer.steps.fused_cpu.update import Rows, Update
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["Plain"]

STEP = """
  %g = call float @llvm.fma.f32(float %weight_decay, float %x.0, float %g.0)
  %b.1 = call float @llvm.fma.f32(float %momentum, float %b.0, float %g)
  %n = call float @llvm.fma.f32(float %momentum, float %b.1, float %g)
  %minus = fneg float %lr
  %x.1 = call float @llvm.fma.f32(float %minus, float {update}, float %x.0)
  store float %b.1, ptr %b.p
  store float %x.1, ptr %x.p
"""


class Plain(Update):
    """What torch.optim.SGD does, here so that a step need not leave for it with a handful of small tensors.

    With the gradient g, the weight decay λ and the momentum μ::

        b = μ b + g + λ x
        x = x - lr b, or x - lr (g + λ x + μ b) for Nesterov
    """

    name: ClassVar[str] = "plain"
    geometry: ClassVar[type[Euclidean]] = Euclidean
    arrays: ClassVar[tuple[str, ...]] = ("x", "grad", "bx")
    numbers: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def body(self, *, nesterov: bool, masked: bool, momenta: bool) -> str:
        """The equations of the class, element by element."""
        lines = self.loads({"x": "x", "g": "grad", "b": "bx"})
        return "\n".join([*lines, STEP.format(update="%n" if nesterov else "%b.1")])

    def fill(self, rows: Rows, weights: SparseWeights, base: BaseOptimizer, now: Now) -> list[list[float]]:
        """``weight_decay``."""
        by_group = [float(base.options(group)["weight_decay"]) for group in range(len(now.lrs))]
        return [[by_group[group] for group in rows.groups]]
