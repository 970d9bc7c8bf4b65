"""Norms over whole maps: of some channels together, ``gain[c] (x - mean) / sqrt(variance + eps) + shift[c]``.

Mean and variance are those of all numbers of a group of channels: Wu and He, arXiv 1803.08494.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import FLOAT, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["FIELDS", "GROUP_NORM", "GroupNormSpec", "emit"]

FIELDS = ("x", "out", "gain", "shift", "inside", "flag")


@dataclass(frozen=True)
class GroupNormSpec:
    """What the code depends on.

    Attributes:
        layout: of one channel.
        channels: of a group.
    """

    target: Target
    layout: Layout
    channels: int
    eps: float


def emit(spec: GroupNormSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: groups.

    The squares are summed of what is left without the mean, where a map has numbers: what lies around is zero.
    """
    e, layout = Emitter(spec.target, name, FIELDS), spec.layout
    x, out, there = e.buffer("x"), e.buffer("out"), e.constants("inside")
    gains, shifts = e.constants("gain"), e.constants("shift")

    def at_group(group: Value, _: list[Value]) -> None:
        first = e.mul(group, spec.channels)

        def total(change: Callable[[Value, Value], Value]) -> Value:
            """Of all channels, each summed by itself first: no sum is of more numbers than need be."""

            def at_channel(number: Value, sums: list[Value]) -> list[Value]:
                plane = e.at(x, e.add(e.mul(e.add(first, number), layout.plane), layout.origin))

                def add(i: Value, found: list[Value]) -> list[Value]:
                    value = e.converted(e.load(e.at(plane, i), aligned=True), FLOAT)
                    with e.floats():
                        return [e.fadd(found[0], change(value, i))]

                with e.floats():
                    nothing = e.zero()
                (one,) = e.loop(0, layout.groups * layout.pitch, add, [nothing], step=e.lanes)
                with e.floats():
                    return [e.fadd(sums[0], one)]

            with e.floats():
                start = e.zero()
            (sums,) = e.loop(0, spec.channels, at_channel, [start])
            with e.floats():
                return e.splat(e.total(sums))

        with e.floats():
            share = e.splat(1.0 / (spec.channels * layout.height * layout.width))
        mean = e.fmul(total(lambda value, i: value), share)

        def square(value: Value, i: Value) -> Value:
            value = e.fmul(e.b.fsub(value, mean), e.load(e.at(there, e.add(i, layout.origin))))
            return e.fmul(value, value)

        variance = e.fmul(total(square), share)
        with e.floats():
            scale = e.fdiv(e.splat(1.0), e.root(e.fadd(variance, e.splat(spec.eps))))

        def write(number: Value, _: list[Value]) -> None:
            channel = e.add(first, number)
            shift = e.mul(channel, layout.plane)
            source, place = e.at(x, shift), e.at(out, shift)
            with e.floats():
                gain = e.fmul(e.splat(e.load_float(e.at(gains, channel))), scale)
                bias = e.splat(e.load_float(e.at(shifts, channel)))

            def at(i: Value, _: list[Value]) -> None:
                value = e.converted(e.load(e.at(source, i), aligned=True), FLOAT)
                with e.floats():
                    value = e.fma(e.b.fsub(value, mean), gain, bias)
                    kept = e.b.fcmp_ordered("!=", e.load(e.at(there, i)), e.zero())
                    value = e.b.select(kept, value, e.zero())
                value = e.converted(value)
                e.watch(value)
                e.store(value, e.at(place, i), aligned=True)

            e.loop(0, layout.plane, at, step=e.lanes)

        e.loop(0, spec.channels, write)

    e.loop(e.low, e.high, at_group)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    layout, channels = op.spec.layout, op.units * op.spec.channels
    if layout.flat or layout.plane % op.spec.target.lanes:
        raise IndexError(f"{op.node!r}: planes of {layout.plane} numbers")
    for name in ("x", "out"):
        inside(op, name, op.args[name], op.args[name] + channels * layout.plane, numbers)
    for name in ("gain", "shift"):
        inside(op, name, 0, channels, op.args[name].size)
    inside(op, "inside", 0, layout.plane, op.args["inside"].size)


GROUP_NORM = Kernel("groupnorm", FIELDS, emit, check)
