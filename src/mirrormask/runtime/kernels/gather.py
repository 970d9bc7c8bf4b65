"""Planes in another order: ``out[c] = x[order[c]]``, zeros around the maps included."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import I32, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["FIELDS", "GATHER", "GatherSpec", "emit"]

FIELDS = ("x", "out", "order", "flag")


@dataclass(frozen=True)
class GatherSpec:
    """What the code depends on: the layout of one channel, the same on both sides."""

    target: Target
    layout: Layout


def emit(spec: GatherSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels of the result."""
    e = Emitter(spec.target, name, FIELDS)
    x, out, order, plane = e.buffer("x"), e.buffer("out"), e.constants("order"), spec.layout.plane

    def at_channel(channel: Value, _: list[Value]) -> None:
        source = e.at(x, e.mul(e.load_int(order, channel, I32), plane))
        place = e.at(out, e.mul(channel, plane))

        def at_vector(i: Value, _: list[Value]) -> None:
            e.store(e.load(e.at(source, i), aligned=True), e.at(place, i), aligned=True)

        e.loop(0, plane, at_vector, step=e.lanes)

    e.loop(e.low, e.high, at_channel)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    plane, order = op.spec.layout.plane, op.args["order"]
    if plane % op.spec.target.lanes or order.size < op.units or int(order.min(initial=0)) < 0:
        raise IndexError(f"{op.node!r}: planes of {plane} numbers, or an order that is too short")
    inside(op, "x", op.args["x"], op.args["x"] + (int(order.max(initial=0)) + 1) * plane, numbers)
    inside(op, "out", op.args["out"], op.args["out"] + op.units * plane, numbers)


GATHER = Kernel("gather", FIELDS, emit, check)
