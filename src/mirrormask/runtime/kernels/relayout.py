"""Copies between layouts: a tensor comes in, a map goes out, or a map is split into the phases of a strided layer.

A layer of stride ``s`` reads every ``s``-th row and column. Split into ``s * s`` phase maps,

    phase (a, b) of channel c  =  rows a, a + s, a + 2s, ... and columns b, b + s, ... of channel c,

it becomes a layer of stride 1 over the phases, and the one kernel serves both.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import FLOAT, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.kernels.rows import each_chunk, each_row, row_pointer, width_step

__all__ = ["FIELDS", "RELAYOUT", "RelayoutSpec", "emit", "plain_layout"]

FIELDS = ("x", "out", "flag")
#: Phases that have code of their own.
MOST_PHASES = 9


def plain_layout(channels: int, height: int, width: int) -> Layout:
    """A contiguous ``[channels, height, width]`` tensor, seen as a layout."""
    return Layout(channels, height, width, 1, width, 1, 0)


@dataclass(frozen=True)
class RelayoutSpec:
    """What the code depends on.

    Attributes:
        source, out: the layouts, for one channel.
        source_external, out_external: whether ``x`` / ``out`` number a tensor or index the arena.
        step: the strides (row, column) of the phases; (1, 1) for a plain copy.
        phases: the (row, column) phases that are wanted, in the order of the output's planes.
        transposed: 0, or the features of a ``[tokens, features]`` tensor on the external side, whose column
            ``c`` is channel ``c``.
        some: whether only the tensor's first rows are there, as many as :mod:`mirrormask.runtime.kernels.facts` says.
    """

    target: Target
    source: Layout
    out: Layout
    source_external: bool
    out_external: bool
    step: tuple[int, int] = (1, 1)
    phases: tuple[tuple[int, int], ...] = ((0, 0),)
    transposed: int = 0
    some: bool = False


def emit(spec: RelayoutSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: input channels."""
    e = Emitter(spec.target, name, FIELDS)
    x = e.external("x") if spec.source_external else e.buffer("x")
    result = e.external("out") if spec.out_external else e.buffer("out")
    body = _transposed if spec.transposed else _planes
    e.loop(e.low, e.high, lambda channel, _: body(e, spec, x, result, channel))
    return e.finish()


def _planes(e: Emitter, spec: RelayoutSpec, x: Value, result: Value, channel: Value) -> None:
    """Copy one channel's map, or each wanted phase of it."""
    source, out = spec.source, spec.out
    chunk = width_step(out, e.lanes)
    # Tensors outside hold 32-bit floats, whatever the plan computes with.
    read = FLOAT if spec.source_external else e.number
    write = FLOAT if spec.out_external else e.number
    from_plane = e.at(x, e.add(e.mul(channel, source.plane), source.origin), read)

    def copy_phase(same: Alike, i: Value, j: Value) -> None:
        number = e.add(e.mul(i, same.pitch), e.add(j, same.number))
        a, b = e.add(i, same.row), e.add(j, same.column)
        index = e.add(e.mul(channel, len(spec.phases)), number)
        to_plane = e.at(result, e.add(e.mul(index, out.plane), out.origin), write)

        def copy_row(row: Value, pointer: Value) -> None:
            from_row = row_pointer(e, source, from_plane, e.add(e.mul(row, spec.step[0]), a), read)

            def copy(first: Value, valid: list[int]) -> None:
                with e.numbers(read):
                    place = e.at(from_row, e.add(e.mul(first, spec.step[1]), b))
                    value = strided_load(e, place, spec.step[1], valid[0], chunk)
                value = e.converted(value, write)
                if spec.source_external:
                    e.watch(value)
                place = e.at(pointer, first, write)
                # Rows without anything between them: what is past one may be another thread's.
                exact = spec.out_external or out.lanes == 1
                e.store_part(value, place, valid[1]) if exact else e.store(value, place)

            each_chunk(e, (same.width, out.width), chunk, copy)

        def clear_row(row: Value, pointer: Value) -> None:
            each_chunk(e, (out.width,), chunk, lambda first, _: e.store(e.zero(chunk), e.at(pointer, first)))

        each_row(e, out, to_plane, 0, same.height, copy_row, write)
        if not spec.out_external:
            # An earlier user of this memory may have had a larger phase.
            each_row(e, out, to_plane, same.height, out.height, clear_row)

    for same in _alike(spec):
        if same.rows == same.columns == 1:
            copy_phase(same, e.whole(0), e.whole(0))
        else:

            def at_phase(i: Value, _: list[Value], same: Alike = same) -> None:
                e.loop(0, same.columns, lambda j, _: copy_phase(same, i, j))

            e.loop(0, same.rows, at_phase)


@dataclass
class Alike:
    """Phases whose maps have one size: ``rows`` x ``columns`` from (``row``, ``column``) on.

    Attributes:
        number: of the first one; ``pitch`` from a row of them to the next.
        height, width: of their maps.
    """

    number: int
    row: int
    column: int
    height: int
    width: int
    pitch: int
    rows: int = 1
    columns: int = 1


def _alike(spec: RelayoutSpec) -> list[Alike]:
    """The phases one by one or, if they are many, those that are alike together: a loop rather than code for each."""
    pitch, found = len({b for _, b in spec.phases}), list[Alike]()
    for number, (a, b) in enumerate(spec.phases):
        height = max(0, min(-(-(spec.source.height - a) // spec.step[0]), spec.out.height))
        width = max(0, min(-(-(spec.source.width - b) // spec.step[1]), spec.out.width))
        found.append(Alike(number, a, b, height, width, pitch))
    if len(found) <= MOST_PHASES:
        return found
    lines = list[Alike]()
    for one in found:
        last = lines[-1] if lines else None
        beside = last is not None and (one.row, one.column) == (last.row, last.column + last.columns)
        if last is not None and beside and (one.height, one.width) == (last.height, last.width):
            last.columns += 1
        else:
            lines.append(one)
    groups = dict[tuple[int, ...], Alike]()
    done = list[Alike]()
    for line in lines:
        key = (line.column, line.columns, line.height, line.width)
        first = groups.get(key)
        below = first is not None and line.row == first.row + first.rows
        if first is not None and below and line.number == first.number + first.rows * pitch:
            first.rows += 1
        else:
            groups[key] = line
            done.append(line)
    return done


def _transposed(e: Emitter, spec: RelayoutSpec, x: Value, result: Value, channel: Value) -> None:
    """Copy column ``channel`` of a ``[tokens, features]`` tensor to a plane, or a plane to such a column."""
    features = spec.transposed
    plane = spec.source if spec.out_external else spec.out
    shift = e.add(e.mul(channel, plane.plane), plane.origin)

    rows = e.fact("rows") if spec.some else e.whole(plane.width)
    whole = e.b.and_(rows, e.whole(-e.lanes)) if spec.some else rows

    def at_vector(first: Value, _: list[Value]) -> None:
        flat, planar = (result, e.at(x, shift)) if spec.out_external else (x, e.at(result, shift))
        column = e.at(flat, e.add(e.mul(first, features), channel), FLOAT)
        places = [e.at(column, lane * features, FLOAT) for lane in range(e.lanes)]
        if spec.out_external:
            value = e.converted(e.load(e.at(planar, first), aligned=True), FLOAT)
            for lane, place in enumerate(places):
                e.store_float(e.extract(value, lane), place)
        else:
            with e.floats():
                value = e.zero()
                for lane, place in enumerate(places):
                    value = e.insert(value, e.load_float(place), lane)
            value = e.converted(value)
            e.watch(value)
            e.store(value, e.at(planar, first), aligned=True)

    def at_rest(first: Value, _: list[Value]) -> None:
        """A vector of which some rows are not there: those that are missing come in as the last one."""
        last = e.b.sub(rows, e.whole(1))
        with e.floats():
            value = e.zero()
            for lane in range(e.lanes):
                row = e.minimum(e.add(first, lane), last)
                value = e.insert(value, e.load_float(e.at(x, e.add(e.mul(row, features), channel))), lane)
        value = e.converted(value)
        e.watch(value)
        e.store(value, e.at(e.at(result, shift), first), aligned=True)

    def at_row(row: Value, _: list[Value]) -> None:
        value = e.converted(e.load_float(e.at(e.at(x, shift), row)), FLOAT)
        e.store_float(value, e.at(result, e.add(e.mul(row, features), channel), FLOAT))

    e.loop(0, whole, at_vector, step=e.lanes)
    if spec.some and spec.out_external:
        e.loop(whole, rows, at_row)
    elif spec.some:
        e.loop(whole, plane.width, at_rest, step=e.lanes)


def strided_load(e: Emitter, pointer: Value, step: int, valid: int, lanes: int) -> Value:
    """Elements 0, step, 2 step, ... of ``pointer``: ``valid`` of them, and zeros up to ``lanes``. Reads no others."""
    if valid <= 0:
        return e.zero(lanes)
    if step == 1:
        return e.load_part(pointer, valid, lanes)
    if step == 2:
        low = e.load_part(pointer, 2 * valid - 1, lanes)
        high = e.load_part(e.at(pointer, lanes), 2 * valid - 1 - lanes, lanes)
        return e.shuffle(low, high, range(0, 2 * lanes, 2))
    value = e.zero(lanes)
    for i in range(valid):
        value = e.insert(value, e.load_float(e.at(pointer, i * step)), i)
    return value


def check(op: Op, numbers: int) -> None:
    """What lies in the arena; tensors are as large as the plan's strides say, which callers check."""
    spec = op.spec
    if not spec.source_external:
        inside(op, "x", op.args["x"], op.args["x"] + op.units * spec.source.plane, numbers)
    if not spec.out_external:
        planes = op.units * len(spec.phases)
        inside(op, "out", op.args["out"], op.args["out"] + planes * spec.out.plane, numbers)


RELAYOUT = Kernel("relayout", FIELDS, emit, check)
