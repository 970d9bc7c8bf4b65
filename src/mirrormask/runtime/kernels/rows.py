"""Walking over the rows of a map, whatever its layout: planes with or without segments, or a plain tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from mirrormask.runtime.kernels.emit import Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["MOST_UNROLLED", "each_chunk", "each_row", "row_pointer", "store_line", "width_step"]

#: Chunks of a row that are written out one after another; of more, so many a round of a loop.
MOST_UNROLLED, A_ROUND = 8, 4


def row_pointer(e: Emitter, layout: Layout, plane: Value, row: Value, number: Any = None) -> Value:
    """The address of column 0 of ``row``; ``plane`` points at the first row of the map, of ``number``s."""
    if layout.segments == 1:
        return e.at(plane, e.mul(row, layout.pitch), number)
    groups = e.whole(layout.groups)
    segment, group = e.b.udiv(row, groups), e.b.urem(row, groups)
    return e.at(plane, e.add(e.mul(group, layout.pitch), e.mul(segment, layout.stride)), number)


def each_row(
    e: Emitter,
    layout: Layout,
    plane: Value,
    low: int,
    high: int,
    body: Callable[[Value, Value], object],
    number: Any = None,
) -> None:
    """``body(row, pointer)`` for every place where a row in [``low``, ``high``) is stored: halo copies included."""
    if low >= high:
        return
    if layout.segments == 1:

        def at_row(row: Value, _: list[Value]) -> None:
            body(row, row_pointer(e, layout, plane, row, number))

        e.loop(low, high, at_row)
        return

    def at_group(group: Value, _: list[Value]) -> None:
        for segment in range(layout.segments):
            row = e.add(group, segment * layout.groups)
            pointer = e.at(plane, e.add(e.mul(group, layout.pitch), segment * layout.stride))
            inside = e.b.and_(e.b.icmp_signed(">=", row, e.whole(low)), e.b.icmp_signed("<", row, e.whole(high)))
            e.when(inside, partial(body, row, pointer))

    e.loop(-layout.halo, layout.groups + layout.halo, at_group)


def width_step(layout: Layout, lanes: int) -> int:
    """Lanes that one store into a row of ``layout`` may write."""
    return min(lanes, layout.stride) if layout.segments > 1 else lanes


def each_chunk(e: Emitter, widths: Sequence[int], chunk: int, body: Callable[[Value, list[int]], object]) -> None:
    """``body(first, valid)`` for every ``chunk`` columns of a row of ``max(widths)``, in loops where it is wide.

    Args:
        widths: where what lies in a row ends: its values, say, and the row itself.
        body: takes the first column of the chunk and, for each of ``widths``, how many of its columns lie below that
            width: numbers known here, since the chunks that a width cuts are apart from the others.
    """
    most = -(-max(widths) // chunk)
    cuts = sorted({0, most, *(n for width in widths for n in (width // chunk, -(-width // chunk)))})

    def at(first: Value, number: int) -> None:
        body(first, [min(chunk, max(0, width - number * chunk)) for width in widths])

    for low, high in pairwise(cuts):
        alike = high - low
        looped = alike // A_ROUND * A_ROUND if alike > MOST_UNROLLED else 0

        def a_round(first: Value, _: list[Value], low: int = low) -> None:
            for i in range(A_ROUND):
                at(e.add(first, i * chunk), low)

        if looped:
            e.loop(low * chunk, (low + looped) * chunk, a_round, step=A_ROUND * chunk)
        for number in range(low + looped, high):
            at(e.whole(number * chunk), number)


def store_line(e: Emitter, layout: Layout, line: Value, pointer: Value) -> None:
    """Write one row of numbers that lie at ``line``, and zeros up to the end of its last vector."""
    chunk = width_step(layout, e.lanes)
    whole, rest = layout.width // chunk * chunk, layout.width % chunk

    def at_chunk(first: Value, _: list[Value]) -> None:
        value = e.load(e.at(line, first), chunk)
        e.watch(value)
        e.store(value, e.at(pointer, first))

    e.loop(0, whole, at_chunk, step=chunk)
    if rest:
        value = e.keep(e.load(e.at(line, whole), chunk), [lane < rest for lane in range(chunk)])
        e.watch(value)
        if layout.lanes == 1:  # what follows is the next row
            e.store_part(value, e.at(pointer, whole), rest)
        else:
            e.store(value, e.at(pointer, whole))
