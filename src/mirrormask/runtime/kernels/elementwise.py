"""Addition and activations that could not be fused: over whole planes, padding included (zero stays zero)."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.activation import activate
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value

__all__ = ["ELEMENTWISE", "FIELDS", "ElementwiseSpec", "emit"]

FIELDS = ("x", "other", "out", "flag")


@dataclass(frozen=True)
class ElementwiseSpec:
    """``out = activation(x + other)`` or, with ``add`` false, ``activation(x)``."""

    target: Target
    add: bool
    activation: str


def emit(spec: ElementwiseSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: vectors; buffers end with a margin, so that the last may be a part of one."""
    e = Emitter(spec.target, name, FIELDS)
    x, other, out = (e.buffer(n) for n in FIELDS[:3])

    def at_vector(i: Value, _: list[Value]) -> None:
        index = e.mul(i, e.lanes)
        value = e.load(e.at(x, index))
        if spec.add:
            value = e.fadd(value, e.load(e.at(other, index)))
        e.store(activate(e, spec.activation, value), e.at(out, index))

    e.loop(e.low, e.high, at_vector)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    width = op.units * op.spec.target.lanes
    for name in ("x", "other", "out") if op.spec.add else ("x", "out"):
        inside(op, name, op.args[name], op.args[name] + width, numbers)


ELEMENTWISE = Kernel("elementwise", FIELDS, emit, check)
