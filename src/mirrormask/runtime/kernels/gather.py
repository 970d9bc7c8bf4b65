"""Planes in another order: ``out[c] = gains[c] x[order[c]]``, zeros around the maps included."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import I32, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["FIELDS", "GATHER", "GatherSpec", "emit"]

FIELDS = ("x", "out", "order", "gains", "flag")


@dataclass(frozen=True)
class GatherSpec:
    """What the code depends on.

    Attributes:
        layout: of one channel, the same on both sides.
        scaled: whether there are gains.
    """

    target: Target
    layout: Layout
    scaled: bool = False


def emit(spec: GatherSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels of the result."""
    e = Emitter(spec.target, name, FIELDS)
    x, out, order, plane = e.buffer("x"), e.buffer("out"), e.constants("order"), spec.layout.plane

    def at_channel(channel: Value, _: list[Value]) -> None:
        source = e.at(x, e.mul(e.load_int(order, channel, I32), plane))
        place = e.at(out, e.mul(channel, plane))
        gain = e.load_float(e.at(e.constants("gains"), channel)) if spec.scaled else None

        def at_vector(i: Value, _: list[Value]) -> None:
            value = e.load(e.at(source, i), aligned=True)
            e.store(value if gain is None else e.fmul(value, e.splat(gain)), e.at(place, i), aligned=True)

        if spec.layout.flat:  # one number each
            number = e.load_float(source)
            e.store_float(number if gain is None else e.fmul(number, gain), place)
        else:
            e.loop(0, plane, at_vector, step=e.lanes)

    e.loop(e.low, e.high, at_channel)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    plane, order = op.spec.layout.plane, op.args["order"]
    if (
        (not op.spec.layout.flat and plane % op.spec.target.lanes)
        or order.size < op.units
        or int(order.min(initial=0)) < 0
    ):
        raise IndexError(f"{op.node!r}: planes of {plane} numbers, or an order that is too short")
    if op.spec.scaled:
        inside(op, "gains", 0, op.units, op.args["gains"].size)
    inside(op, "x", op.args["x"], op.args["x"] + (int(order.max(initial=0)) + 1) * plane, numbers)
    inside(op, "out", op.args["out"], op.args["out"] + op.units * plane, numbers)


GATHER = Kernel("gather", FIELDS, emit, check)
