"""Momentum, step, mask and push of x = a sinh(u) in one loop: three arrays read, three written.

Without momentum two are read and two written.
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

from torch import Tensor

from mirrormask.geometry import Geometry, MirrorDescent
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.steps.base import Now
from mirrormask.optimizer.steps.fused_cpu.update import Rows, Update, float_literal
from mirrormask.optimizer.weights import STATE_SNAP, SparseWeights

__all__ = ["Dual"]

#: sinh of more than this is not a finite float32.
LARGEST = 88.0
#: ``cosh(r) = C(r²)`` and ``sinh(r) = r S(r²)`` for ``|r| <= ln(2) / 2``, to float32: highest power first.
COSH = [1 / math.factorial(k) for k in (6, 4, 2, 0)]
SINH = [1 / math.factorial(k) for k in (7, 5, 3, 1)]

MOMENTUM = """
  %b.1 = call float @llvm.fma.f32(float %momentum, float %b.0, float %g.0)
  %b.abs = call float @llvm.fabs.f32(float %b.1)
  %b.big = fcmp uge float %b.abs, {state_snap}
  %b.2 = select i1 %b.big, float %b.1, float 0.0
  %n = call float @llvm.fma.f32(float %momentum, float %b.2, float %g.0)
{store}
"""
#: Between -clip and clip by comparison: of NaN and clip, minnum would give clip.
STEP = """
  %d.0 = fmul float %lr, {update}
  %d.above = fcmp ogt float %d.0, %clip
  %d.most = select i1 %d.above, float %clip, float %d.0
  %d.least = fneg float %clip
  %d.below = fcmp olt float %d.most, %d.least
  %d = select i1 %d.below, float %d.least, float %d.most
  %u.1 = fsub float %u.0, %d
"""
MASK = """
  %alive.p = getelementptr i8, ptr %mask, i64 %i
  %alive.0 = load i8, ptr %alive.p
  %alive = icmp ne i8 %alive.0, 0
  %u.2 = select i1 %alive, float %u.1, float 0.0
"""
#: With t = 2^k and r = u - k ln 2: 2 sinh(u) = (t - 1/t) cosh(r) + (t + 1/t) sinh(r), without loss where u is small.
#: Where u is NaN so is r, and the result, whatever integer k becomes.
BEGIN = """
  %s.below = fcmp olt float {u}, {least}
  %s.low = select i1 %s.below, float {least}, float {u}
  %s.above = fcmp ogt float %s.low, {largest}
  %s.u = select i1 %s.above, float {largest}, float %s.low
  %s.scaled = fmul float %s.u, {log2e}
  %s.k = call float @llvm.rint.f32(float %s.scaled)
  %s.r = call float @llvm.fma.f32(float %s.k, float {minus_ln2}, float %s.u)
  %s.square = fmul float %s.r, %s.r
"""
END = """
  %s.odd = fmul float %s.r, {sinh}
  %s.any = fptosi float %s.k to i32
  %s.int = freeze i32 %s.any
  %s.shifted = shl i32 %s.int, 23
  %s.up = add i32 %s.shifted, 1065353216
  %s.down = sub i32 1065353216, %s.shifted
  %s.t = bitcast i32 %s.up to float
  %s.inverse = bitcast i32 %s.down to float
  %s.difference = fsub float %s.t, %s.inverse
  %s.sum = fadd float %s.t, %s.inverse
  %s.even = fmul float %s.difference, {cosh}
  %s.twice = call float @llvm.fma.f32(float %s.sum, float %s.odd, float %s.even)
  %x.1 = fmul float %s.twice, %half
  %x.2 = fadd float %x.1, 0.0
  store float {u}, ptr %u.p
  store float %x.2, ptr %x.p
"""


class Dual(Update):
    """The update of :class:`mirrormask.geometry.MirrorDescent`.

    With the gradient g of x, the scale a (that has decayed by this step) and the mask::

        b = μ b + g
        d = lr b, or lr (g + μ b) for Nesterov, or lr g without momentum         (between -clip and clip)
        u = u - d                                                 (0 if pruned)
        x = a sinh(u)
    """

    name: ClassVar[str] = "dual"
    geometry: ClassVar[type[Geometry]] = MirrorDescent
    arrays: ClassVar[tuple[str, ...]] = ("x", "grad", "u", "bu")
    numbers: ClassVar[tuple[str, ...]] = ("half", "clip")
    latents: ClassVar[tuple[str, ...]] = ("u",)
    streams: ClassVar[bool] = True

    def masks(self, weights: SparseWeights) -> list[Tensor] | None:
        """The masks, once there are any: a weight at zero does not stay there by itself."""
        found = [mask for mask in map(weights.mask_of, weights.values()) if mask is not None]
        return found or None

    def body(self, *, nesterov: bool, masked: bool, momenta: bool) -> str:
        """The equations of the class, element by element."""
        lines = self.loads({"g": "grad", "u": "u", **({"b": "bu"} if momenta else {})})
        lines += ["  %x.p = getelementptr float, ptr %x, i64 %i"]
        if momenta:
            lines += [MOMENTUM.format(state_snap=float_literal(STATE_SNAP), store=self.store("b", "%b.2"))]
        lines += [STEP.format(update="%g.0" if not momenta else "%n" if nesterov else "%b.2")]
        u = "%u.2" if masked else "%u.1"
        lines += [MASK] if masked else []
        split = {"largest": float_literal(LARGEST), "least": float_literal(-LARGEST)}
        split |= {"log2e": float_literal(1 / math.log(2)), "minus_ln2": float_literal(-math.log(2))}
        lines += [BEGIN.format(u=u, **split)]
        ends = {name: self._polynomial(name, powers, lines) for name, powers in (("cosh", COSH), ("sinh", SINH))}
        return "\n".join([*lines, END.format(u=u, **ends)])

    def _polynomial(self, name: str, coefficients: list[float], lines: list[str]) -> str:
        """Add Horner's scheme in r² to ``lines``; where its value is."""
        value = float_literal(coefficients[0])
        for power, coefficient in enumerate(coefficients[1:]):
            terms = f"float {value}, float %s.square, float {float_literal(coefficient)}"
            value = f"%s.{name}{power}"
            lines.append(f"  {value} = call float @llvm.fma.f32({terms})")
        return value

    def fill(self, rows: Rows, weights: SparseWeights, base: BaseOptimizer, now: Now) -> list[list[float]]:
        """The decay of this step, then ``half = a / 2`` and ``clip``."""
        geometry = cast("MirrorDescent", weights.geometry)
        scales = [weights.state(x)["a"] for x in rows.parameters]
        for group, increment in enumerate(now.increments):
            if increment:
                chosen = [scale for scale, of in zip(scales, rows.groups, strict=True) if of == group]
                geometry.shrink({"a": chosen}, now.keep(group))
        clip = math.inf if geometry.clip is None else geometry.clip
        return [[scale.item() / 2 for scale in scales], [clip] * len(scales)]
