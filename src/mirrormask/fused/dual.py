"""Momentum, step, mask and push of x = a sinh(u) in one loop: three arrays read, three written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mirrormask.fused.update import SNAP, STATE_SNAP, Update, float_literal
from mirrormask.geometry import Geometry
from mirrormask.geometry.mirror_descent import is_mirror_descent

if TYPE_CHECKING:
    from mirrormask.optimizer import SparseOptimizer

__all__ = ["Dual"]

#: ln 2 in two parts: the first has so few digits that its product with a small integer is exact in float32.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
#: sinh of more than this is not a finite float32.
LARGEST = 88.0
#: ``expm1(r) = r + r² (1/2 + r/6 + ...)`` for ``|r| <= ln(2) / 2``, to float32: highest power first.
TAYLOR = [1 / math.factorial(k) for k in range(7, 1, -1)]

STEP = """
  %b.1 = call float @llvm.fma.f32(float %momentum, float %b.0, float %g.0)
  %b.abs = call float @llvm.fabs.f32(float %b.1)
  %b.big = fcmp oge float %b.abs, {state_snap}
  %b.2 = select i1 %b.big, float %b.1, float 0.0
  %n = call float @llvm.fma.f32(float %momentum, float %b.2, float %g.0)
  %u.1 = call float @llvm.fma.f32(float %minus, float {update}, float %u.0)
  %u.abs = call float @llvm.fabs.f32(float %u.1)
  %u.big = fcmp oge float %u.abs, {snap}
  %u.2 = select i1 %u.big, float %u.1, float 0.0
"""
MASK = """
  %alive.p = getelementptr i8, ptr %mask, i64 %i
  %alive.0 = load i8, ptr %alive.p
  %alive = icmp ne i8 %alive.0, 0
  %u.3 = select i1 %alive, float %u.2, float 0.0
"""
#: With t = 2^k and r = |u| - k ln 2: e = expm1(|u|) = t expm1(r) + (t - 1), and sinh(|u|) = (e + e / (e + 1)) / 2.
SINH_BEGIN = """
  %s.abs = call float @llvm.fabs.f32(float {u})
  %s.u = call float @llvm.minnum.f32(float %s.abs, float {largest})
  %s.scaled = fmul float %s.u, {log2e}
  %s.k = call float @llvm.rint.f32(float %s.scaled)
  %s.minus = fneg float %s.k
  %s.r0 = call float @llvm.fma.f32(float %s.minus, float {high}, float %s.u)
  %s.r = call float @llvm.fma.f32(float %s.minus, float {low}, float %s.r0)
"""
SINH_END = """
  %s.square = fmul float %s.r, %s.r
  %s.m = call float @llvm.fma.f32(float %s.square, float {poly}, float %s.r)
  %s.int = fptosi float %s.k to i32
  %s.biased = add i32 %s.int, 127
  %s.bits = shl i32 %s.biased, 23
  %s.t = bitcast i32 %s.bits to float
  %s.t1 = fadd float %s.t, -1.0
  %s.e = call float @llvm.fma.f32(float %s.t, float %s.m, float %s.t1)
  %s.e1 = fadd float %s.e, 1.0
  %s.q = fdiv float %s.e, %s.e1
  %s.sum = fadd float %s.e, %s.q
  %s.half = fmul float %s.sum, 0.5
  %s.sinh = call float @llvm.copysign.f32(float %s.half, float {u})
  %x.1 = fmul float %s.sinh, %a
  %x.2 = fadd float %x.1, 0.0
  store float {u}, ptr %u.p
  store float %b.2, ptr %b.p
  store float %x.2, ptr %x.p
"""


class Dual(Update):
    """The update of :class:`mirrormask.geometry.MirrorDescent`.

    With the gradient g of x, the scale a (that has decayed by this step) and the mask::

        b = μ b + g
        u = u - lr (b, or g + μ b for Nesterov)                   (0 if below SNAP, or pruned)
        x = a sinh(u)
    """

    name: ClassVar[str] = "dual"
    arrays: ClassVar[tuple[str, ...]] = ("x", "grad", "u", "bu")
    numbers: ClassVar[tuple[str, ...]] = ("a",)
    latents: ClassVar[tuple[str, ...]] = ("u",)

    def serves(self, geometry: Geometry) -> bool:
        """MirrorDescent, and what changes nothing of its pullback and push."""
        return is_mirror_descent(geometry)

    def masks(self, optimizer: SparseOptimizer) -> list[Tensor] | None:
        """The masks, once there are any: a weight at zero does not stay there by itself."""
        masks = [optimizer.state[x].get("mask") for x in optimizer.weights.values()]
        found = [mask for mask in masks if mask is not None]
        return found or None

    def body(self, *, nesterov: bool, masked: bool) -> str:
        """The equations of the class, element by element."""
        pointers = {"g": "grad", "u": "u", "b": "bu"}
        lines = [f"  %{value}.p = getelementptr float, ptr %{array}, i64 %i" for value, array in pointers.items()]
        lines += [f"  %{value}.0 = load float, ptr %{value}.p" for value in pointers]
        lines += ["  %x.p = getelementptr float, ptr %x, i64 %i"]
        numbers = {"snap": float_literal(SNAP), "state_snap": float_literal(STATE_SNAP)}
        lines += [STEP.format(update="%n" if nesterov else "%b.2", **numbers)]
        u = "%u.3" if masked else "%u.2"
        lines += [MASK] if masked else []
        split = {"high": float_literal(LN2_HIGH), "low": float_literal(LN2_LOW)}
        split |= {"largest": float_literal(LARGEST), "log2e": float_literal(1 / math.log(2))}
        lines += [SINH_BEGIN.format(u=u, **split)]
        poly = float_literal(TAYLOR[0])
        for power, coefficient in enumerate(TAYLOR[1:]):
            terms = f"float {poly}, float %s.r, float {float_literal(coefficient)}"
            poly = f"%s.p{power}"
            lines.append(f"  {poly} = call float @llvm.fma.f32({terms})")
        return "\n".join([*lines, SINH_END.format(u=u, poly=poly)])

    def fill(self, rows: Any, optimizer: SparseOptimizer, groups: npt.NDArray[np.int64], owner: Any) -> None:
        """The decay of this step, which is all in ``a``."""
        states = [optimizer.state[x] for x in optimizer.weights.values()]
        for group, increment in enumerate(optimizer.increments):
            members = np.unique(owner[groups == group])
            if increment and members.size:
                optimizer.method.geometry.shrink({"a": [states[i]["a"] for i in members]}, 1 - 2 * increment)
        rows["a"] = np.array([float(state["a"]) for state in states], np.float32)[owner]
