"""Zeros around the maps of a buffer whose memory held another layout: the halo, between planes, and before."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["CLEAR", "FIELDS", "ClearSpec", "emit"]

FIELDS = ("out",)


@dataclass(frozen=True)
class ClearSpec:
    """What the code depends on: the layout of one channel, whether its rows are cleared too, and how much before it."""

    target: Target
    layout: Layout
    whole: bool
    margin: int


def emit(spec: ClearSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels."""
    e = Emitter(spec.target, name, FIELDS)
    layout = spec.layout
    end = layout.origin + layout.groups * layout.pitch

    def clear(plane: Value, low: int, high: int) -> None:
        def at_vector(i: Value, _: list[Value]) -> None:
            e.store(e.zero(), e.at(plane, i))

        e.loop(low, high, at_vector, step=e.lanes)

    def at_channel(channel: Value, _: list[Value]) -> None:
        plane = e.at(e.buffer("out"), e.mul(channel, layout.plane))
        if spec.whole:
            clear(plane, 0, layout.plane)
        else:
            clear(plane, 0, layout.origin)
            clear(plane, end, layout.plane)

    is_first = e.b.icmp_signed("==", e.low, e.whole(0))
    e.when(is_first, lambda: clear(e.at(e.buffer("out"), -spec.margin), 0, spec.margin))
    e.loop(e.low, e.high, at_channel)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    out, spec = op.args["out"], op.spec
    inside(op, "out", out - spec.margin, out + op.units * spec.layout.plane, numbers)


CLEAR = Kernel("clear", FIELDS, emit, check)
