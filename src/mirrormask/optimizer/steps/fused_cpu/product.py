"""Pullback, momentum, decay, step and push of x = m ⊙ w in one loop: five arrays read, five written.

Without momentum three are read and three written.
"""

from __future__ import annotations

from typing import ClassVar

from mirrormask.geometry import Geometry, Hadamard
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.steps.base import Now
from mirrormask.optimizer.steps.fused_cpu.update import Rows, Update, float_literal
from mirrormask.optimizer.weights import SNAP, STATE_SNAP, SparseWeights

__all__ = ["Product"]

#: What happens to each of the two factors (own = m, other = w, and the other way round): its gradient,
GRADIENT = """
  %c{own} = fmul float %coupled, %{own}.0
  %g{own} = call float @llvm.fma.f32(float %g, float %{other}.0, float %c{own})
"""
#: its momentum, if there is one,
MOMENTUM = """
  %b{own}.1 = call float @llvm.fma.f32(float %momentum, float %b{own}.0, float %g{own})
  %b{own}.abs = call float @llvm.fabs.f32(float %b{own}.1)
  %b{own}.big = fcmp uge float %b{own}.abs, {state_snap}
  %b{own}.2 = select i1 %b{own}.big, float %b{own}.1, float 0.0
  %n{own} = call float @llvm.fma.f32(float %momentum, float %b{own}.2, float %g{own})
{store}
"""
#: and the step.
STEP = """
  %k{own} = fmul float %keep, %{own}.0
  %{own}.1 = call float @llvm.fma.f32(float %minus, float {update}, float %k{own})
  %{own}.abs = call float @llvm.fabs.f32(float %{own}.1)
  %{own}.big = fcmp uge float %{own}.abs, {snap}
  %{own}.2 = select i1 %{own}.big, float %{own}.1, float 0.0
  store float %{own}.2, ptr %{own}.p
"""


class Product(Update):
    """The update of :class:`mirrormask.geometry.Hadamard`.

    With ``c = 2α`` where the decay is coupled (else 0) and ``keep = 1 - 2 lr α`` where it is not (else 1)::

        gm = g w + c m                gw = g m + c w
        bm = μ bm + gm                bw = μ bw + gw
        um = gm + μ bm or bm          uw = gw + μ bw or bw        (Nesterov or not; gm and gw without momentum)
        m  = keep m - lr um           w  = keep w - lr uw         (0 if below SNAP)
        x  = m w

    What is NaN is not below SNAP, and stays NaN. A pruned pair is at zero and stays there by itself, so there is no
    mask in the loop.
    """

    name: ClassVar[str] = "product"
    geometry: ClassVar[type[Geometry]] = Hadamard
    arrays: ClassVar[tuple[str, ...]] = ("x", "grad", "m", "w", "bm", "bw")
    numbers: ClassVar[tuple[str, ...]] = ("keep", "coupled")
    latents: ClassVar[tuple[str, ...]] = ("m", "w")
    streams: ClassVar[bool] = True
    snaps: ClassVar[bool] = True

    def body(self, *, nesterov: bool, masked: bool, momenta: bool) -> str:
        """The equations of the class, element by element."""
        lines = self.loads({"g": "grad", "m": "m", "w": "w", **({"bm": "bm", "bw": "bw"} if momenta else {})})
        update = "%g{own}" if not momenta else "%n{own}" if nesterov else "%b{own}.2"
        factor = GRADIENT + (MOMENTUM if momenta else "") + STEP.replace("{update}", update)
        lines += [
            "  %g = fadd float %g.0, 0.0",
            "  %x.p = getelementptr float, ptr %x, i64 %i",
            "  %minus = fneg float %lr",
        ]
        snaps = {"snap": float_literal(SNAP), "state_snap": float_literal(STATE_SNAP)}
        lines += [
            factor.format(own=own, other=other, store=self.store(f"b{own}", f"%b{own}.2", place), **snaps)
            for place, (own, other) in enumerate((("m", "w"), ("w", "m")))
        ]
        lines += ["  %x.1 = fmul float %m.2, %w.2", "  store float %x.1, ptr %x.p"]
        return "\n".join(lines)

    def fill(self, rows: Rows, weights: SparseWeights, base: BaseOptimizer, now: Now) -> list[list[float]]:
        """``keep`` and ``coupled``."""
        groups = range(len(now.lrs))
        keep = [now.keep(group) for group in groups]
        coupled = [2 * now.alpha(group) if now.coupled else 0.0 for group in groups]
        return [[keep[group] for group in rows.groups], [coupled[group] for group in rows.groups]]
