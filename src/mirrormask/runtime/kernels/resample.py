"""Rows and columns picked by tables: padding, cropping, and interpolation.

Without ``linear``, ``out[r, c] = x[rows[r] - 1, columns[c] - 1]``, and ``fill`` where a table holds 0. With it,

    line = (1 - u_r) x[rows[r]] + u_r x[rows_next[r]]
    out[r, c] = (1 - v_c) line[columns[c]] + v_c line[columns_next[c]]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.kernels.rows import each_row, row_pointer, store_line, width_step

__all__ = ["FIELDS", "RESAMPLE", "ResampleSpec", "emit"]

FIELDS = ("x", "out", "rows", "rows_next", "row_weight", "columns", "columns_next", "column_weight", "flag")


@dataclass(frozen=True)
class ResampleSpec:
    """What the code depends on: the layouts, for one channel."""

    target: Target
    source: Layout
    out: Layout
    linear: bool
    fill: float = 0.0


def emit(spec: ResampleSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels."""
    e = Emitter(spec.target, name, FIELDS)
    source, out = spec.source, spec.out
    tables = {field: e.constants(field) for field in FIELDS[2:8]}
    made, line = e.scratch(source.width + 2 * e.lanes), e.scratch(out.width + 2 * e.lanes)
    fill = e.real(spec.fill)

    def at_columns(value: Callable[[Value], Value]) -> None:
        e.loop(0, out.width, lambda c, _: e.store_float(value(c), e.at(line, c)))

    def picked(plane: Value, row: Value) -> None:
        place = e.load_int(tables["rows"], row)
        line_in = row_pointer(e, source, plane, e.maximum(e.b.sub(place, e.whole(1)), e.whole(0)))
        outside = e.b.icmp_signed("==", place, e.whole(0))

        def value(c: Value) -> Value:
            column = e.load_int(tables["columns"], c)
            found = e.load_float(e.at(line_in, e.maximum(e.b.sub(column, e.whole(1)), e.whole(0))))
            return e.b.select(e.b.or_(outside, e.b.icmp_signed("==", column, e.whole(0))), fill, found)

        at_columns(value)

    def between(plane: Value, row: Value) -> None:
        read = width_step(source, e.lanes)
        upper, lower = (row_pointer(e, source, plane, e.load_int(tables[n], row)) for n in ("rows", "rows_next"))
        weight = e.splat(e.load_float(e.at(tables["row_weight"], row)), read)

        def mix(a: Value, b: Value, share: Value) -> Value:
            return e.fma(e.b.fsub(b, a), share, a)

        def at_chunk(i: Value, _: list[Value]) -> None:
            e.store(mix(e.load(e.at(upper, i), read), e.load(e.at(lower, i), read), weight), e.at(made, i))

        e.loop(0, source.width, at_chunk, step=read)

        def value(c: Value) -> Value:
            a, b = (e.load_float(e.at(made, e.load_int(tables[n], c))) for n in ("columns", "columns_next"))
            return mix(a, b, e.load_float(e.at(tables["column_weight"], c)))

        at_columns(value)

    def at_channel(channel: Value, _: list[Value]) -> None:
        from_plane = e.at(e.buffer("x"), e.add(e.mul(channel, source.plane), source.origin))
        to_plane = e.at(e.buffer("out"), e.add(e.mul(channel, out.plane), out.origin))

        def at_row(row: Value, pointer: Value) -> None:
            (between if spec.linear else picked)(from_plane, row)
            store_line(e, out, line, pointer)

        each_row(e, out, to_plane, 0, out.height, at_row)

    e.loop(e.low, e.high, at_channel)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    source, out, shift = op.spec.source, op.spec.out, 0 if op.spec.linear else 1
    for name, layout in (("x", source), ("out", out)):
        inside(op, name, op.args[name], op.args[name] + op.units * layout.plane, numbers)
    for axis, size, count in (("row", source.height, out.height), ("column", source.width, out.width)):
        names = (f"{axis}s", f"{axis}s_next", f"{axis}_weight") if op.spec.linear else (f"{axis}s",)
        if any(op.args[name].size < count for name in names):
            raise IndexError(f"{op.node!r}: fewer places than the result has {axis}s")
        for name in names[:2]:
            inside(op, name, int(op.args[name].min()), int(op.args[name].max()) + 1, size + shift)


RESAMPLE = Kernel("resample", FIELDS, emit, check)
