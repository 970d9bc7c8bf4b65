"""A sparse linear layer on a single vector: eight rows pick their inputs from a table in a register, not from memory.

Rows are sorted by their number of nonzeros and taken eight at a time, one a lane. A slice has a table of eight inputs,
two windows of four consecutive ones, from which one permutation fetches an input for each row:

    for each slice s:   table = x[a[s] : a[s] + 4], x[b[s] : b[s] + 4]
        sum += weight[s] * table[place[s]]

That is two loads of inputs a slice where :mod:`mirrormask.runtime.kernels.vector` takes eight. Windows lie anywhere, in
any order: packing takes, slice by slice, the two that serve most rows. At 90% zeros a nonzero costs 1.6 slots, at 95%
two; the fewer nonzeros there are, the fewer lie close to each other, and from about 97% on single loads are as fast.

Weights are floats, levels of 8 bits (``out = scale * sum + bias``) or halves; places take 4 bits, sums are of 32 bits.
A slot without a nonzero multiplies some input by zero, which must not make NaN of an infinite one: if the input holds
such, a second loop leaves those products out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.activation import activate
from mirrormask.runtime.kernels.base import Kernel, Op, inside, pointers
from mirrormask.runtime.kernels.emit import I16, I32, Emitter, Value
from mirrormask.runtime.kernels.vector import VectorSpec, check_stored, holds_strange, stored_factors

__all__ = ["FIELDS", "LANES", "ROUND", "TABLES", "emit", "pack", "serves"]

FIELDS = ("x", "out", "bias", "weights", "places", "windows", "starts", "rows", "scales", "terms", "flag")

#: Rows of a group, which AVX2's permutation serves; inputs of a window; slices of a round, each with sums of its own.
LANES, WIDTH, ROUND = 8, 4, 4
#: Bytes of masks that packing looks through at a time: they stay in the cache.
PART = 1 << 18

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

#: How many rows a mask of eight holds.
_ROWS = np.array([bin(mask).count("1") for mask in range(256)], np.uint8)
_rows_in: Callable[[Bytes], Bytes] = getattr(np, "bitwise_count", _ROWS.take)  # (which NumPy has from 2.0 on)


#: The place of a lane that a slice has nothing for.
NONE = 255


def serves(target: Target) -> bool:
    """Whether a processor has the permutation, for numbers of 32 bits."""
    return "avx2" in target.needs and not target.half


def pack(
    counts: Ints,
    nonzeros: Callable[[], Iterable[tuple[Ints, Ints, npt.NDArray[Any]]]],
    terms: int,
    zeros: Callable[[int], npt.NDArray[Any]],
) -> dict[str, npt.NDArray[Any]]:
    """The constants of a layer, by field name.

    Args:
        counts: the nonzeros of each row.
        nonzeros: gives (row, column, value) of them, in order, in as many parts as there may be; asked twice.
        terms: inputs, at most 65,536.
        zeros: makes the array of so many weights.

    Returns:
        weights: of ``[slices, 8]``.
        places: the inputs' places in the tables, 4 bits each: ``[slices / 4, 8]`` words, the first slice's lowest.
        windows: where the two windows of each slice begin.
        starts: the first round of four slices of each group, and the end.
        rows: the row behind each lane. Those that fill up the last group are numbered from ``outputs`` on, in the
            margin behind the result.

    Example:
        >>> row, column, value = np.array([0, 0, 1]), np.array([0, 9, 8]), np.array([1.0, 2.0, 3.0])
        >>> args = pack(np.array([2, 1]), lambda: [(row, column, value)], 12, lambda size: np.zeros(size))
        >>> args["windows"].tolist()[:2], args["weights"][:2].tolist()
        ([6, 0], [2.0, 3.0])
    """
    outputs = len(counts)
    groups = -(-outputs // LANES)
    rows = np.argsort(-counts, kind="stable")
    rows = np.concatenate([rows, np.arange(outputs, groups * LANES)])
    lane_of = np.empty(outputs, np.int64)
    lane_of[rows[rows < outputs]] = np.flatnonzero(rows < outputs)
    masks = np.zeros((groups, terms + WIDTH), np.uint8)
    for row, column, _ in nonzeros():
        lane = lane_of[row]
        for bit in range(LANES):  # (no place is there twice in one of these)
            here = lane % LANES == bit
            masks[lane[here] // LANES, column[here]] |= 1 << bit
    found = list(_slices(masks, terms))
    rounds = np.array([-(-len(windows) // ROUND) for windows, _, _ in found], np.int64)
    starts = np.concatenate([[0], np.cumsum(rounds)])
    size = int(starts[-1]) * ROUND
    windows, places = np.zeros((size, 2), np.uint16), np.zeros((size, LANES), np.uint16)
    row_starts = np.concatenate([[0], np.cumsum(counts)])
    slot = np.zeros(
        int(row_starts[-1]), np.uint32 if size * LANES < 1 << 32 else np.uint64
    )  # of each nonzero, in order
    for group, (begin, columns, place) in enumerate(found):
        first = int(starts[group]) * ROUND
        there = place < NONE
        windows[first : first + len(begin)], places[first : first + len(begin)] = begin, place * there
        lane, number = np.nonzero(there.T)
        order = np.argsort(lane * terms + columns[number, lane].astype(np.int64))
        lane, number = lane[order], number[order]
        before = np.searchsorted(lane, np.arange(LANES))  # how many nonzeros are in the lanes before
        nonzero = row_starts[rows[group * LANES + lane]] + np.arange(len(lane)) - before[lane]
        slot[nonzero] = (first + number) * LANES + lane
    del found  # of a wide layer all of this is as large as the dense weights
    weights, done = zeros(size * LANES), 0
    for row, _, values in nonzeros():
        weights[slot[done : done + len(row)]] = values
        done += len(row)
    del slot
    shifts = (4 * np.arange(ROUND, dtype=np.uint16))[None, :, None]
    return {
        "weights": weights,
        "places": np.bitwise_or.reduce(places.reshape(-1, ROUND, LANES) << shifts, axis=1).reshape(-1),
        "windows": windows.reshape(-1),
        "starts": starts.astype(np.int32),
        "rows": rows.astype(np.int32),
    }


def _slices(masks: Bytes, terms: int) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """For each group of rows: windows ``[slices, 2]``, and columns and places (:data:`NONE`) of ``[slices, 8]``.

    Args:
        masks: for each group and column the rows that have a nonzero there, a bit each; changed.
    """
    step = max(1, PART // masks.shape[1])
    for low in range(0, len(masks), step):
        yield from _packed(masks[low : low + step], terms)


def _packed(masks: Bytes, terms: int) -> list[tuple[npt.NDArray[Any], ...]]:
    """:func:`_slices` of some groups at once, slice by slice: each takes the windows that serve most rows."""
    count, ends = len(masks), max(1, terms - WIDTH + 1)
    live = np.flatnonzero(masks.any(1))
    made: list[tuple[npt.NDArray[Any], ...]] = []
    while len(live):
        left = masks if len(live) == count else masks[live]
        near = left[:, :ends] | left[:, 1 : ends + 1]
        near |= left[:, 2 : ends + 2]
        near |= left[:, 3 : ends + 3]
        free = np.full(len(live), 255, np.uint8)
        begin, served = np.zeros((len(live), 2), np.int64), np.zeros((len(live), 2, WIDTH), np.uint8)
        for part in range(2):
            begin[:, part] = first = _rows_in(near & free[:, None] if part else near).argmax(1)
            window = first[:, None] + np.arange(WIDTH)
            there = masks[live[:, None], window]
            for offset in range(WIDTH):
                served[:, part, offset] = there[:, offset] & free
                free &= ~there[:, offset]
            masks[live[:, None], window] = there & ~served[:, part]
        made.append((live, begin, served))
        live = live[masks[live].any(1)]
    if not made:
        return [(np.zeros((0, 2), np.uint16), np.zeros((0, LANES), np.uint16), np.zeros((0, LANES), np.uint8))] * count
    member, begin, served = (np.concatenate([row[k] for row in made]) for k in range(3))
    # A bit for each lane and place: a lane is served from one place of the slice, or from none.
    bits = served.reshape(-1, 2 * WIDTH)[:, :, None] >> np.arange(LANES, dtype=np.uint8) & 1
    place = bits.argmax(1)
    column = (np.take_along_axis(begin, place // WIDTH, axis=1) + place % WIDTH).astype(np.uint16)
    place = np.where(bits.any(1), place, NONE).astype(np.uint8)
    begin = begin.astype(np.uint16)
    order = np.argsort(member, kind="stable")
    parts = np.cumsum(np.bincount(member, minlength=count))[:-1]
    return list(zip(*(np.split(array[order], parts) for array in (begin, column, place)), strict=True))


def emit(spec: VectorSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: groups of eight rows."""
    e = Emitter(spec.target, name, FIELDS)
    x, out = e.buffer("x"), e.buffer("out")
    bias, weights, places, windows, starts, rows, scales = (e.constants(n) for n in FIELDS[2:9])
    factors_at = stored_factors(e, spec.weights, weights, LANES)
    strange = holds_strange(e, x)
    words, indices = ir.VectorType(I16, LANES), ir.VectorType(I32, LANES)

    def at_group(careful: bool, group: Value) -> None:
        first = e.mul(group, LANES)

        def round_(number: Value, sums: list[Value]) -> list[Value]:
            word = e.b.load(e.at(places, e.mul(number, LANES), I16), align=2, typ=words)
            word, found = e.b.zext(word, indices), []
            for i, total in enumerate(sums):
                s = e.add(e.mul(number, ROUND), i)
                begins = [e.load_int(windows, e.add(e.mul(s, 2), part), I16) for part in range(2)]
                low, high = (e.load(e.at(x, begin), WIDTH) for begin in begins)
                table = e.shuffle(low, high, range(LANES))
                shifted = e.b.lshr(word, ir.Constant(indices, [4 * i] * LANES)) if i else word
                value = e.picked(table, shifted)
                factors, used = factors_at(e.mul(s, LANES))
                if careful:
                    value = e.b.select(used, value, e.zero(LANES))
                found.append(e.fma(factors, value, total))
            return found

        nothing = [e.zero(LANES)] * ROUND
        sums = e.loop(e.load_int(starts, group), e.load_int(starts, e.add(group, 1)), round_, nothing)
        total = e.fadd(e.fadd(sums[0], sums[1]), e.fadd(sums[2], sums[3]))
        added = e.load(e.at(bias, first), LANES)
        if spec.weights == "int8":
            total = e.fma(total, e.load(e.at(scales, first), LANES), added)
        else:
            total = e.fadd(total, added)
        e.scatter(activate(e, spec.activation, total), out, e.at(rows, first, I32))

    def groups(careful: bool) -> list[Value]:
        return e.loop(e.low, e.high, lambda group, _: at_group(careful, group))

    e.either(strange, lambda: groups(True), lambda: groups(False))
    return e.finish()


def check(op: Op, numbers: int) -> None:
    """The windows, the weights of each round, and the outputs scattered to; places are taken of a table's eight."""
    args = op.args
    starts = pointers(op, "starts", args["weights"].size // (ROUND * LANES))
    if starts.size != op.units + 1 or args["rows"].size != op.units * LANES or args["bias"].size < op.units * LANES:
        raise IndexError(f"{op.node!r}: starts, rows and bias have sizes that do not belong together")
    rounds = int(starts[-1])
    if args["places"].size < rounds * LANES or args["windows"].size < rounds * ROUND * 2:
        raise IndexError(f"{op.node!r}: places and windows are fewer than starts says")
    check_stored(op, LANES)
    highest = int(args["windows"].reshape(-1)[: rounds * ROUND * 2].max(initial=0)) + WIDTH
    lanes = op.spec.target.lanes
    inside(op, "x", args["x"], args["x"] + max(highest, -(-args["terms"] // lanes) * lanes), numbers)
    rows = args["rows"]
    inside(op, "out", args["out"] + int(rows.min()), args["out"] + int(rows.max()) + 1, numbers)


TABLES = Kernel("vector_tables", FIELDS, emit, check, is_layer=True)
