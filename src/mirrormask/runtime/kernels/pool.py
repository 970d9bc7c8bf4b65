"""Max and average pooling over maps, and the global average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import FLOAT, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.kernels.relayout import strided_load
from mirrormask.runtime.kernels.rows import each_chunk, each_row, row_pointer, width_step

__all__ = ["FIELDS", "MEAN", "POOL", "MeanSpec", "PoolSpec", "emit", "emit_mean"]

FIELDS = ("x", "out", "flag")
#: Numbers of a scratch row, and kernel columns that are written out one after another.
MOST_SCRATCH, MOST_COLUMNS = 4096, 16


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

    Each output row is reduced down its input rows into a padded scratch row, then across. A scratch row is short
    however wide the map is: wide ones are taken block by block, and windows longer than it one by one.
    """
    e = Emitter(spec.target, name, FIELDS)
    source, out, block = spec.source, spec.out, _block(spec)
    make = _by_window if block == 0 else _at_once if block >= out.width else _in_blocks
    at_row = make(e, spec)

    def at_channel(channel: Value, _: list[Value]) -> None:
        from_plane = e.at(e.buffer("x"), e.add(e.mul(channel, source.plane), source.origin))
        to_plane = e.at(e.buffer("out"), e.add(e.mul(channel, out.plane), out.origin))

        def put(row: Value, pointer: Value) -> None:
            start = e.b.sub(e.mul(row, spec.stride[0]), e.whole(spec.padding[0]))
            low = e.maximum(start, e.whole(0))
            high = e.minimum(e.add(start, spec.kernel[0]), e.whole(source.height))
            at_row(Rows(from_plane, low, high), pointer)

        each_row(e, out, to_plane, 0, out.height, put)

    e.loop(e.low, e.high, at_channel)
    return e.finish()


@dataclass(frozen=True)
class Rows:
    """The input rows in [``low``, ``high``) of the plane at ``plane``, which an output row is made of."""

    plane: Value
    low: Value
    high: Value


AtRow = Callable[[Rows, Value], None]


def _block(spec: PoolSpec) -> int:
    """The outputs of a row that a scratch row has room for: whole vectors of them, or none."""
    chunk = width_step(spec.out, spec.target.lanes)
    return max(0, MOST_SCRATCH - spec.kernel[1]) // spec.stride[1] // chunk * chunk


def _neutral(spec: PoolSpec) -> float:
    return 0.0 if spec.mean else float("-inf")


def _join(e: Emitter, spec: PoolSpec) -> Callable[[Value, Value], Value]:
    return e.fadd if spec.mean else e.larger


def _down(e: Emitter, spec: PoolSpec, rows: Rows, first: Value) -> Value:
    """The input columns from ``first`` on, reduced over the rows."""
    lanes = width_step(spec.source, e.lanes)

    def add(r: Value, best: list[Value]) -> list[Value]:
        value = e.load(e.at(row_pointer(e, spec.source, rows.plane, r), first), lanes)
        return [_join(e, spec)(best[0], value)]

    return e.loop(rows.low, rows.high, add, [e.splat(_neutral(spec), lanes)])[0]


def _across(e: Emitter, spec: PoolSpec, rows: Rows, window: Value, first: Value) -> Value:
    """The outputs from ``first`` on, whose columns lie at ``window``; zero beyond the row."""
    chunk, columns, step = width_step(spec.out, e.lanes), spec.kernel[1], spec.stride[1]
    join = _join(e, spec)

    def at(k: Value | int) -> Value:
        return strided_load(e, e.at(window, k), step, chunk, chunk)

    if columns > MOST_COLUMNS:
        (value,) = e.loop(1, columns, lambda k, sums: [join(sums[0], at(k))], [at(0)])
    else:
        value = reduce(join, [at(k) for k in range(columns)])
    if spec.mean:
        e.watch(value)
        value = e.fmul(value, _shares(e, spec, e.b.sub(rows.high, rows.low), first, chunk))
    return e.keep_below(value, first, spec.out.width)


def _at_once(e: Emitter, spec: PoolSpec) -> AtRow:
    """All of a row in one scratch row, whose padding is written once."""
    source, out, left, step = spec.source, spec.out, spec.padding[1], spec.stride[1]
    chunk, read = width_step(out, e.lanes), width_step(source, e.lanes)
    size = left + max(source.width, (out.width + e.lanes) * step + spec.kernel[1] + e.lanes)
    scratch = e.scratch(size + 2 * e.lanes)
    clean = e.splat(_neutral(spec))
    _fill(e, scratch, clean, e.whole(0), e.whole(left))
    _fill(e, scratch, clean, e.whole((left + source.width) // e.lanes * e.lanes), e.whole(size + e.lanes))

    def at_row(rows: Rows, pointer: Value) -> None:
        def down(first: Value, valid: list[int]) -> None:
            e.store_part(_down(e, spec, rows, first), e.at(scratch, e.add(first, left)), valid[0])

        def across(first: Value, _: list[int]) -> None:
            value = _across(e, spec, rows, e.at(scratch, e.mul(first, step)), first)
            e.store(value, e.at(pointer, first))

        each_chunk(e, (source.width,), read, down)
        each_chunk(e, (out.width,), chunk, across)

    return at_row


def _in_blocks(e: Emitter, spec: PoolSpec) -> AtRow:
    """So many outputs at a time as a scratch row has room for; its padding is written where it is at the map's edge."""
    source, out, step = spec.source, spec.out, spec.stride[1]
    chunk, read, block = width_step(out, e.lanes), width_step(source, e.lanes), _block(spec)
    span = (block - 1) * step + spec.kernel[1]
    # Reading begins at a whole vector of the row, at most so far before the block.
    window = e.at(e.scratch(read + span + 2 * e.lanes), read)
    clean = e.splat(_neutral(spec))

    def at_row(rows: Rows, pointer: Value) -> None:
        def at_block(first: Value, _: list[Value]) -> None:
            start = e.b.sub(e.mul(first, step), e.whole(spec.padding[1]))
            end = e.minimum(e.add(start, span), e.whole(source.width))
            whole = e.b.and_(e.maximum(start, e.whole(0)), e.whole(-read))

            def down(column: Value, _: list[Value]) -> None:
                e.store(_down(e, spec, rows, column), e.at(window, e.b.sub(column, start)))

            def across(column: Value, _: list[Value]) -> None:
                place = e.at(window, e.mul(e.b.sub(column, first), step))
                e.store(_across(e, spec, rows, place, column), e.at(pointer, column))

            _fill(e, window, clean, e.whole(0), e.b.sub(e.whole(0), start))
            e.loop(whole, end, down, step=read)
            _fill(e, window, clean, e.b.sub(end, start), e.whole(span))
            e.loop(first, e.minimum(e.add(first, block), e.whole(out.width)), across, step=chunk)

        e.loop(0, out.width, at_block, step=block)

    return at_row


def _by_window(e: Emitter, spec: PoolSpec) -> AtRow:
    """Output by output, each a sum over whole vectors of its own window."""
    source, out, join = spec.source, spec.out, _join(e, spec)
    chunk = width_step(out, e.lanes)
    tail = out.width // chunk * chunk

    def at_row(rows: Rows, pointer: Value) -> None:
        if tail < out.width:
            e.store(e.zero(chunk), e.at(pointer, tail))

        def at_output(column: Value, _: list[Value]) -> None:
            start = e.b.sub(e.mul(column, spec.stride[1]), e.whole(spec.padding[1]))
            low = e.maximum(start, e.whole(0))
            high = e.minimum(e.add(start, spec.kernel[1]), e.whole(source.width))
            size = e.b.sub(high, low)
            whole = e.add(low, e.b.and_(size, e.whole(-e.lanes)))

            def add(r: Value, best: list[Value]) -> list[Value]:
                row = row_pointer(e, source, rows.plane, r)
                vectors = e.loop(low, whole, lambda c, s: [join(s[0], e.load(e.at(row, c)))], best[:1], step=e.lanes)
                rest = e.loop(whole, high, lambda c, s: [join(s[0], e.load_float(e.at(row, c)))], best[1:])
                return [*vectors, *rest]

            vector, rest = e.loop(rows.low, rows.high, add, [e.splat(_neutral(spec)), e.real(_neutral(spec))])
            value = reduce(join, [e.extract(vector, lane) for lane in range(e.lanes)], rest)
            if spec.mean:
                e.watch(e.splat(value))
                number = e.mul(size, e.b.sub(rows.high, rows.low))
                with e.floats():
                    count = e.real(spec.kernel[0] * spec.kernel[1]) if spec.count_padding else e.to_float(number)
                    value = e.fdiv(e.converted(value), count)
                value = e.converted(value)
            e.store_float(value, e.at(pointer, column))

        e.loop(0, out.width, at_output)

    return at_row


def _fill(e: Emitter, pointer: Value, value: Value, low: Value, high: Value) -> None:
    """Write ``value`` from ``low`` up to ``high``, and perhaps some lanes further."""
    e.loop(low, high, lambda i, _: e.store(value, e.at(pointer, i)), step=e.lanes)


def _shares(e: Emitter, spec: PoolSpec, rows_inside: Value, first: Value, chunk: int) -> Value:
    """One over the number of pixels that each output averages."""
    if spec.count_padding:
        return e.splat(1.0 / (spec.kernel[0] * spec.kernel[1]), chunk)

    def all_of(value: int) -> Value:
        return e.ramp(e.whole(value), chunk, 0)

    starts = e.ramp(e.b.sub(e.mul(first, spec.stride[1]), e.whole(spec.padding[1])), chunk, spec.stride[1])
    ends = e.minimum(e.b.add(starts, all_of(spec.kernel[1])), all_of(spec.source.width))
    widths = e.maximum(e.b.sub(ends, e.maximum(starts, all_of(0))), all_of(1))
    shares = e.fdiv(e.splat(1.0, chunk), e.b.sitofp(widths, e.vector_type(chunk)))
    return e.fdiv(shares, e.splat(e.to_float(rows_inside), chunk))


@dataclass(frozen=True)
class MeanSpec:
    """What the code of the global average depends on.

    Attributes:
        root: whether it is the root of the sum of all squares instead.
    """

    target: Target
    source: Layout
    root: bool = False


def emit_mean(spec: MeanSpec, name: str) -> str:
    """The global average, ``out[channel]``. Padding lanes are zero, so whole vectors are summed."""
    e = Emitter(spec.target, name, FIELDS)
    source, lanes = spec.source, spec.source.lanes
    out = e.buffer("out")

    def at_channel(channel: Value, _: list[Value]) -> None:
        plane = e.at(e.buffer("x"), e.add(e.mul(channel, source.plane), source.origin))

        def add(i: Value, sums: list[Value]) -> list[Value]:
            value = e.converted(e.load(e.at(plane, i), aligned=True), FLOAT)
            return [e.fadd(sums[0], e.fmul(value, value) if spec.root else value)]

        with e.floats():
            zero, scale = e.zero(), e.real(1.0 / (source.height * source.width))
        (sums,) = e.loop(0, source.groups * source.pitch, add, [zero], step=lanes)
        total = e.total(sums)
        e.store_float(e.converted(e.root(total) if spec.root else e.fmul(total, scale)), e.at(out, channel))

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
