"""What combines equal shapes number by number and could not be fused: over whole buffers, zeros around maps included.

Only for what makes zero of zeros; :mod:`mirrormask.runtime.kernels.planes` is for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.activation import Chain, activate
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value

__all__ = ["COMBINE", "ELEMENTWISE", "FIELDS", "REVERSED", "ElementwiseSpec", "emit"]

FIELDS = ("x", "other", "out", "flag")

#: What can become of two numbers.
COMBINE: dict[str, Callable[[Emitter, Value, Value], Value]] = {
    "add": lambda e, x, other: e.fadd(x, other),
    "mul": lambda e, x, other: e.fmul(x, other),
    "sub": lambda e, x, other: e.b.fsub(x, other),
    "rsub": lambda e, x, other: e.b.fsub(other, x),
    "div": lambda e, x, other: e.fdiv(x, other),
    "rdiv": lambda e, x, other: e.fdiv(other, x),
    "max": lambda e, x, other: e.larger(x, other),
    "min": lambda e, x, other: e.smaller(x, other),
}
#: The same with the two exchanged.
REVERSED = {"sub": "rsub", "rsub": "sub", "div": "rdiv", "rdiv": "div"}


@dataclass(frozen=True)
class ElementwiseSpec:
    """``out = activation(combine(x, other))`` or, without a ``combine``, ``activation(x)``.

    Attributes:
        single: whether ``other`` is one number for all.
    """

    target: Target
    combine: str
    activation: Chain
    single: bool = False


def emit(spec: ElementwiseSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: vectors; buffers end with a margin, so that the last may be a part of one."""
    e = Emitter(spec.target, name, FIELDS)
    x, other, out = (e.buffer(n) for n in FIELDS[:3])

    one = e.splat(e.load_float(other)) if spec.single else None

    def at_vector(i: Value, _: list[Value]) -> None:
        index = e.mul(i, e.lanes)
        value = e.load(e.at(x, index))
        if spec.combine:
            second = e.load(e.at(other, index)) if one is None else one
            value = COMBINE[spec.combine](e, value, second)
        e.store(activate(e, spec.activation, value), e.at(out, index))

    e.loop(e.low, e.high, at_vector)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    width = op.units * op.spec.target.lanes
    for name in ("x", "other", "out") if op.spec.combine else ("x", "out"):
        read = 1 if name == "other" and op.spec.single else width
        inside(op, name, op.args[name], op.args[name] + read, numbers)


ELEMENTWISE = Kernel("elementwise", FIELDS, emit, check)
