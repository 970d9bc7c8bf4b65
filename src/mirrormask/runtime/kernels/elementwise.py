"""Addition and activations that could not be fused: over whole planes, padding included (zero stays zero)."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.emit import Emitter, Value
from mirrormask.runtime.kernels.activation import activate

__all__ = ["FIELDS", "ElementwiseSpec", "emit"]

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
