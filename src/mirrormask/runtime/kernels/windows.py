"""Pooling over windows of any sizes: adaptive pools, and averages whose last windows run over the edge.

    out[r, c] = share_r share_c sum of x[rows[r], columns[c]],    or the maximum of them

Each row is reduced down the rows of its windows, then window by window.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.kernels.rows import each_row, row_pointer, store_line, width_step

__all__ = ["FIELDS", "WINDOWS", "WindowsSpec", "emit"]

FIELDS = ("x", "out", "row_low", "row_high", "column_low", "column_high", "row_share", "column_share", "flag")


@dataclass(frozen=True)
class WindowsSpec:
    """What the code depends on: the layouts, for one channel, and whether it averages; else it takes the maximum."""

    target: Target
    source: Layout
    out: Layout
    mean: bool


def emit(spec: WindowsSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels."""
    e = Emitter(spec.target, name, FIELDS)
    source, out = spec.source, spec.out
    tables = {field: e.constants(field) for field in FIELDS[2:8]}
    read = width_step(source, e.lanes)
    join = e.fadd if spec.mean else e.larger
    neutral = 0.0 if spec.mean else float("-inf")
    sums, line = e.scratch(source.width + 2 * e.lanes), e.scratch(out.width + 2 * e.lanes)

    def at_channel(channel: Value, _: list[Value]) -> None:
        from_plane = e.at(e.buffer("x"), e.add(e.mul(channel, source.plane), source.origin))
        to_plane = e.at(e.buffer("out"), e.add(e.mul(channel, out.plane), out.origin))

        def at_row(row: Value, pointer: Value) -> None:
            low, high = e.load_int(tables["row_low"], row), e.load_int(tables["row_high"], row)

            def at_chunk(first: Value, _: list[Value]) -> None:
                def down(r: Value, best: list[Value]) -> list[Value]:
                    return [join(best[0], e.load(e.at(row_pointer(e, source, from_plane, r), first), read))]

                (value,) = e.loop(low, high, down, [e.splat(neutral, read)])
                e.store(value, e.at(sums, first))

            e.loop(0, source.width, at_chunk, step=read)

            def at_column(c: Value, _: list[Value]) -> None:
                def across(i: Value, best: list[Value]) -> list[Value]:
                    return [join(best[0], e.load_float(e.at(sums, i)))]

                ends = e.load_int(tables["column_low"], c), e.load_int(tables["column_high"], c)
                (value,) = e.loop(*ends, across, [e.real(neutral)])
                if spec.mean:
                    value = e.fmul(value, e.load_float(e.at(tables["column_share"], c)))
                    value = e.fmul(value, e.load_float(e.at(tables["row_share"], row)))
                e.store_float(value, e.at(line, c))

            e.loop(0, out.width, at_column)
            store_line(e, out, line, pointer)

        each_row(e, out, to_plane, 0, out.height, at_row)

    e.loop(e.low, e.high, at_channel)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    source, out = op.spec.source, op.spec.out
    for name, layout in (("x", source), ("out", out)):
        inside(op, name, op.args[name], op.args[name] + op.units * layout.plane, numbers)
    for axis, size, count in (("row", source.height, out.height), ("column", source.width, out.width)):
        low, high, share = (op.args[f"{axis}_{part}"] for part in ("low", "high", "share"))
        if min(low.size, high.size, share.size) < count:
            raise IndexError(f"{op.node!r}: fewer windows than the result has {axis}s")
        inside(op, f"the {axis}s", int(low.min()), int(high.max()), size)


WINDOWS = Kernel("windows", FIELDS, emit, check)
