"""What combines numbers over maps and must leave the zeros around them: functions that move zero, and broadcasts.

    out[c] = activation(combine(x[c], other[c]))

with a map, one number (``other`` holds one per channel) or the same map for every channel in the place of ``other[c]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.activation import Chain, activate
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.elementwise import COMBINE
from mirrormask.runtime.kernels.emit import I1, I32, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["FIELDS", "PLANES", "PlanesSpec", "emit"]

FIELDS = ("x", "other", "out", "flag")


@dataclass(frozen=True)
class PlanesSpec:
    """What the code depends on.

    Attributes:
        layout: of ``x`` and ``out``, and of ``other`` where it holds maps; for one channel.
        combine: what is done with ``x`` and ``other``; ``""`` to leave ``other`` out.
        other: ``"maps"``, ``"numbers"`` (one per channel) or ``"map"`` (one for all channels).
    """

    target: Target
    layout: Layout
    combine: str
    other: str
    activation: Chain


def emit(spec: PlanesSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels."""
    e = Emitter(spec.target, name, FIELDS)
    layout = spec.layout
    x, other, out = (e.buffer(n) for n in FIELDS[:3])

    def at_channel(channel: Value, _: list[Value]) -> None:
        shift = e.add(e.mul(channel, layout.plane), layout.origin)
        from_plane, to_plane = e.at(x, shift), e.at(out, shift)
        beside = e.at(other, layout.origin if spec.other == "map" else shift)
        number = e.splat(e.load_float(e.at(other, channel))) if spec.combine and spec.other == "numbers" else None

        def at(index: Value, keep: Callable[[Value], Value]) -> None:
            value = e.load(e.at(from_plane, index), aligned=True)
            if spec.combine:
                second = e.load(e.at(beside, index), aligned=True) if number is None else number
                value = COMBINE[spec.combine](e, value, second)
            e.store(keep(activate(e, spec.activation, value)), e.at(to_plane, index), aligned=True)

        (_shared_rows if layout.segments > 1 else _rows)(e, layout, at)

    e.loop(e.low, e.high, at_channel)
    return e.finish()


def _rows(e: Emitter, layout: Layout, at: Callable[[Value, Callable[[Value], Value]], None]) -> None:
    """Each row: its whole vectors, then the one that the map ends in."""
    whole, rest = layout.width // e.lanes * e.lanes, layout.width % e.lanes

    def at_row(row: Value, _: list[Value]) -> None:
        start = e.mul(row, layout.pitch)
        e.loop(0, whole, lambda i, _: at(e.add(start, i), lambda value: value), step=e.lanes)
        if rest:
            at(e.add(start, whole), lambda value: e.keep(value, [lane < rest for lane in range(e.lanes)]))

    e.loop(0, layout.height, at_row)


def _shared_rows(e: Emitter, layout: Layout, at: Callable[[Value, Callable[[Value], Value]], None]) -> None:
    """Each row vector, halo copies included: row ``group + segment * groups`` in each segment, if there is one."""
    kind = ir.VectorType(I32, e.lanes)
    segments = [lane // layout.stride for lane in range(e.lanes)]
    columns = ir.Constant(ir.VectorType(I1, e.lanes), [lane % layout.stride < layout.width for lane in range(e.lanes)])
    shifts = ir.Constant(kind, [segment * layout.groups for segment in segments])
    first, end = (ir.Constant(kind, [n] * e.lanes) for n in (0, layout.height))

    def at_group(group: Value, _: list[Value]) -> None:
        rows = e.b.add(e.splat_int(e.b.trunc(group, I32)), shifts)
        inside_rows = e.b.and_(e.b.icmp_signed(">=", rows, first), e.b.icmp_signed("<", rows, end))
        mask = e.b.and_(inside_rows, columns)
        at(e.mul(group, layout.pitch), lambda value: e.b.select(mask, value, e.zero()))

    e.loop(-layout.halo, layout.groups + layout.halo, at_group)


def check(op: Op, numbers: int) -> None:
    layout = op.spec.layout
    for name in ("x", "out"):
        inside(op, name, op.args[name], op.args[name] + op.units * layout.plane, numbers)
    if op.spec.combine:
        size = {"maps": op.units * layout.plane, "numbers": op.units, "map": layout.plane}[op.spec.other]
        inside(op, "other", op.args["other"], op.args["other"] + size, numbers)


PLANES = Kernel("planes", FIELDS, emit, check)
