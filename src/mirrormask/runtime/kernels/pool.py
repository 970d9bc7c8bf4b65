"""Max and average pooling over maps, and the global average."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import FLOAT, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.kernels.relayout import strided_load
from mirrormask.runtime.kernels.rows import each_row, row_pointer, width_step

__all__ = ["FIELDS", "MEAN", "POOL", "MeanSpec", "PoolSpec", "emit", "emit_mean"]

FIELDS = ("x", "out", "flag")


@dataclass(frozen=True)
class PoolSpec:
    """What the code depends on.

    Attributes:
        kernel, stride, padding: (rows, columns) each.
        mean: average, else maximum; an average divides by the kernel's size (padding counted) when ``count_padding``,
            else by the number of pixels inside the map.
    """

    target: Target
    source: Layout
    out: Layout
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    mean: bool = False
    count_padding: bool = True


def emit(spec: PoolSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels.

    Each output row is reduced down its input rows into a padded scratch row, then across.
    """
    e = Emitter(spec.target, name, FIELDS)
    source, out = spec.source, spec.out
    (rows, columns), (row_step, column_step), (top, left) = spec.kernel, spec.stride, spec.padding
    chunk = width_step(out, e.lanes)
    read = width_step(source, e.lanes)
    neutral = 0.0 if spec.mean else float("-inf")
    join = e.fadd if spec.mean else e.larger
    reach = (out.width + e.lanes) * column_step + columns + e.lanes
    scratch = e.scratch(left + max(source.width, reach) + 2 * e.lanes)
    filled = left + source.width

    def at_channel(channel: Value, _: list[Value]) -> None:
        from_plane = e.at(e.buffer("x"), e.add(e.mul(channel, source.plane), source.origin))
        to_plane = e.at(e.buffer("out"), e.add(e.mul(channel, out.plane), out.origin))

        def at_row(row: Value, pointer: Value) -> None:
            start = e.b.sub(e.mul(row, row_step), e.whole(top))
            low = e.maximum(start, e.whole(0))
            high = e.minimum(e.add(start, rows), e.whole(source.height))
            for first in range(0, source.width, read):
                valid = min(read, source.width - first)

                def down(r: Value, best: list[Value], first: int = first) -> list[Value]:
                    value = e.load(e.at(row_pointer(e, source, from_plane, r), first), read)
                    return [join(best[0], value)]

                (value,) = e.loop(low, high, down, [e.splat(neutral, read)])
                e.store_part(value, e.at(scratch, left + first), valid)
            for first in range(0, out.width, chunk):
                valid = min(chunk, out.width - first)
                parts = [
                    strided_load(e, e.at(scratch, first * column_step + k), column_step, chunk, chunk)
                    for k in range(columns)
                ]
                value = parts[0]
                for part in parts[1:]:
                    value = join(value, part)
                if spec.mean:
                    e.watch(value)
                    value = e.fmul(value, _shares(e, spec, e.b.sub(high, low), first, chunk))
                e.store(e.keep(value, [c < valid for c in range(chunk)]), pointer)
                pointer = e.at(pointer, chunk)

        each_row(e, out, to_plane, 0, out.height, at_row)

    for first in range(0, left + max(source.width, reach) + e.lanes, e.lanes):
        if first < left or first + e.lanes > filled:
            e.store(e.splat(neutral), e.at(scratch, first))
    e.loop(e.low, e.high, at_channel)
    return e.finish()


def _shares(e: Emitter, spec: PoolSpec, rows_inside: Value, first: int, chunk: int) -> Value:
    """One over the number of pixels that each output averages."""
    if spec.count_padding:
        return e.splat(1.0 / (spec.kernel[0] * spec.kernel[1]), chunk)
    starts = [(first + c) * spec.stride[1] - spec.padding[1] for c in range(chunk)]
    widths = [max(1, min(s + spec.kernel[1], spec.source.width) - max(s, 0)) for s in starts]
    return e.fdiv(e.values([1.0 / w for w in widths]), e.splat(e.to_float(rows_inside), chunk))


@dataclass(frozen=True)
class MeanSpec:
    """What the code of the global average depends on."""

    target: Target
    source: Layout


def emit_mean(spec: MeanSpec, name: str) -> str:
    """The global average, ``out[channel]``. Padding lanes are zero, so whole vectors are summed."""
    e = Emitter(spec.target, name, FIELDS)
    source, lanes = spec.source, spec.source.lanes
    out = e.buffer("out")

    def at_channel(channel: Value, _: list[Value]) -> None:
        plane = e.at(e.buffer("x"), e.add(e.mul(channel, source.plane), source.origin))

        def add(i: Value, sums: list[Value]) -> list[Value]:
            return [e.fadd(sums[0], e.converted(e.load(e.at(plane, i), aligned=True), FLOAT))]

        with e.floats():
            zero, scale = e.zero(), e.real(1.0 / (source.height * source.width))
        (sums,) = e.loop(0, source.groups * source.pitch, add, [zero], step=lanes)
        e.store_float(e.converted(e.fmul(e.total(sums), scale)), e.at(out, channel))

    e.loop(e.low, e.high, at_channel)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    for name, layout in (("x", op.spec.source), ("out", op.spec.out)):
        inside(op, name, op.args[name], op.args[name] + op.units * layout.plane, numbers)


def check_mean(op: Op, numbers: int) -> None:
    inside(op, "x", op.args["x"], op.args["x"] + op.units * op.spec.source.plane, numbers)
    inside(op, "out", op.args["out"], op.args["out"] + op.units, numbers)


POOL = Kernel("pool", FIELDS, emit, check)
MEAN = Kernel("mean", FIELDS, emit_mean, check_mean)
