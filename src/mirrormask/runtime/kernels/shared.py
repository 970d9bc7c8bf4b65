"""A sparse linear layer on a single vector, for AVX-512: rows share windows of the input, which stay in registers.

A block of ``groups`` x ``lanes`` rows is computed together, one row per lane. Its slices have a window of ``2 * lanes``
consecutive inputs each: two registers, from which one permutation fetches an input for every row of a group:

    for each slice s:   table = x[position[s] : position[s] + 2 lanes]
        for each group g:   sum[g] += weight[s, g] * table[index[s, g]]

Positions advance evenly, so that a row with an average share of nonzeros uses nearly every slice; what misses its
windows (some percent) is added one by one. More slices leave less behind: tuning decides how many.

A slot without a nonzero multiplies some input by zero, which must not make NaN of an infinite one. If the input holds
such, a second loop leaves those products out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.activation import Chain, activate
from mirrormask.runtime.kernels.base import Kernel, Op, inside, pointers
from mirrormask.runtime.kernels.emit import FLOAT, I16, I32, Emitter, Value
from mirrormask.runtime.kernels.vector import holds_strange

__all__ = ["FIELDS", "SHARED", "SharedSpec", "emit", "joined", "pack", "packed", "slices_of"]

FIELDS = (
    "x",
    "out",
    "bias",
    "weights",
    "indices",
    "positions",
    "starts",
    "rest_weights",
    "rest_rows",
    "rest_columns",
    "rest_starts",
    "terms",
    "flag",
)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SharedSpec:
    """What the code depends on: the rows of a block are ``groups`` vectors."""

    target: Target
    activation: Chain
    groups: int


def packed(target: Target) -> int:
    """How many groups share a vector of indices: one for each byte of a word as wide as a number."""
    return target.dtype.itemsize


def pack(weight: npt.NDArray[np.float32], lanes: int, groups: int, slices: float) -> dict[str, npt.NDArray[np.generic]]:
    """The constants of a layer, by field name.

    Args:
        weight: ``[outputs, inputs]``.
        slices: per nonzero of an average row of a block.

    Returns:
        weights: ``[slices, groups, lanes]`` of all blocks, one after another.
        indices: ``[slices, groups / n, lanes]`` words of ``n`` bytes, one for each of ``n`` groups: places in a window.
        positions: where each slice's window begins.
        starts: the first slice of each block, and the end.
        rest_weights, rest_rows, rest_columns, rest_starts: what is added one by one; rows are counted within a block.
    """
    outputs, terms = weight.shape
    height, window = groups * lanes, 2 * lanes
    blocks = -(-outputs // height)
    end = np.iinfo(np.int64).max // 2
    row, column = np.nonzero(weight)
    counts = np.bincount(row, minlength=blocks * height)
    wanted = np.full((blocks * height, counts.max(initial=0) + 1), end)
    wanted[row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]] = column
    sizes = slices_of(counts, height, slices)
    positions = np.full((blocks, sizes.max(initial=0) + 1), end)
    for number, size in enumerate(sizes):
        positions[number, :size] = _positions(terms, window, int(size))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    weights = np.zeros((starts[-1], groups, lanes), np.float32)
    places = np.zeros((starts[-1], groups, lanes), np.uint8)
    at, every = np.zeros(blocks * height, np.int64), np.arange(blocks * height)
    block, group, lane = every // height, every // lanes % groups, every % lanes
    left: list[tuple[Ints, Ints]] = []
    for step in range(positions.shape[1]):
        low = positions[block, step]
        while (late := np.flatnonzero(wanted[every, at] < low)).size:
            left.append((late, wanted[late, at[late]]))
            at[late] += 1
        # The last step has no window anywhere: all that is left is late there.
        taken = np.flatnonzero((wanted[every, at] < low + window) & (low < end))
        slot = starts[block[taken]] + step
        found = wanted[taken, at[taken]]
        weights[slot, group[taken], lane[taken]] = weight[taken, found]
        places[slot, group[taken], lane[taken]] = found - low[taken]
        at[taken] += 1
    words = np.uint32 if lanes == 16 else np.uint16
    share = words(0).nbytes
    indices = places.reshape(len(places), groups // share, share, lanes).transpose(0, 1, 3, 2)
    rest_rows = np.concatenate([rows for rows, _ in left]) if left else np.zeros(0, np.int64)
    rest_columns = np.concatenate([columns for _, columns in left]) if left else np.zeros(0, np.int64)
    # Each pass of the loop above holds a row once, and two additions to one row should not follow each other.
    order = np.argsort(rest_rows // height, kind="stable")
    rest_rows, rest_columns = rest_rows[order], rest_columns[order]
    rest_starts = np.concatenate([[0], np.cumsum(np.bincount(rest_rows // height, minlength=blocks))])
    return {
        "weights": weights,
        "indices": np.ascontiguousarray(indices).view(words).reshape(-1),
        "positions": np.concatenate([positions[b, :n] for b, n in enumerate(sizes)]).astype(np.int32),
        "starts": starts.astype(np.int32),
        "rest_weights": weight[rest_rows, rest_columns],
        "rest_rows": (rest_rows % height).astype(np.uint16),
        "rest_columns": rest_columns.astype(np.uint16),
        "rest_starts": rest_starts.astype(np.int32),
    }


def slices_of(counts: Ints, height: int, slices: float) -> Ints:
    """The slices of each block of ``height`` rows that hold so many nonzeros each, see :func:`pack`."""
    blocks = -(-len(counts) // height)
    padded = np.zeros(blocks * height, np.int64)
    padded[: len(counts)] = counts
    sizes = np.ceil(padded.reshape(blocks, height).mean(1) * slices).astype(np.int64)
    found: Ints = np.maximum(sizes, padded.reshape(blocks, height).any(1))
    return found


def joined(
    parts: Iterable[dict[str, npt.NDArray[Any]]], sizes: Ints, height: int, zeros: Callable[[int], npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The constants of a layer of those of parts of its blocks, one part in memory at a time.

    Args:
        sizes: of all blocks, by :func:`slices_of`.
        zeros: makes the array of so many weights.
    """
    total, done = int(sizes.sum()), 0
    weights, indices = zeros(total * height), np.zeros(0)
    small: dict[str, list[npt.NDArray[Any]]] = {}
    for part in parts:
        made, words = part["positions"].size, part["indices"]
        per_slice = words.size // max(1, made)
        if not done:
            indices = np.zeros(per_slice * total, words.dtype)
        weights[done * height : (done + made) * height] = part["weights"].reshape(-1)
        indices[done * per_slice : (done + made) * per_slice] = words
        for name in ("positions", "rest_weights", "rest_rows", "rest_columns"):
            small.setdefault(name, []).append(part[name])
        small.setdefault("rest_counts", []).append(np.diff(part["rest_starts"]))
        done += made
    found = {name: np.concatenate(arrays) for name, arrays in small.items()}
    rest = zeros(found["rest_weights"].size)
    rest[: found["rest_weights"].size] = found["rest_weights"]
    return {
        "weights": weights,
        "indices": indices,
        "positions": found["positions"],
        "starts": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        "rest_weights": rest,
        "rest_rows": found["rest_rows"],
        "rest_columns": found["rest_columns"],
        "rest_starts": np.concatenate([[0], np.cumsum(found["rest_counts"])]).astype(np.int32),
    }


def _positions(terms: int, window: int, count: int) -> Ints:
    """``count`` windows over ``terms`` inputs, such that every input lies in nearly as many of them."""
    step = terms / max(1, count)
    first = min(0.0, step - window)
    places = first + np.arange(count) * (terms - first) / max(1, count)
    return np.clip(np.round(places), 0, max(0, terms - window)).astype(np.int64)


def emit(spec: SharedSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: blocks."""
    e = Emitter(spec.target, name, FIELDS)
    x, out = e.buffer("x"), e.buffer("out")
    bias, weights, positions, starts = (e.constants(n) for n in ("bias", "weights", "positions", "starts"))
    height = spec.groups * e.lanes
    with e.floats():
        scratch = e.scratch(height)
        zeros = [e.zero()] * spec.groups
    strange = holds_strange(e, x)

    def at_block(block: Value, _: list[Value]) -> None:
        with e.floats():
            for g in range(spec.groups):
                e.store(e.zero(), e.at(scratch, g * e.lanes))
        _add_rest(e, x, scratch, block)
        low, high = e.load_int(starts, block), e.load_int(starts, e.add(block, 1))

        def slices(careful: bool) -> list[Value]:
            def at_slice(s: Value, sums: list[Value]) -> list[Value]:
                table = e.at(x, e.load_int(positions, s))
                halves = e.load(table), e.load(e.at(table, e.lanes))
                first = e.mul(s, height)
                found = []
                for g in range(spec.groups):
                    factors = e.load(e.at(weights, e.add(first, g * e.lanes)), aligned=True)
                    values = e.permuted(*halves, _indices(e, spec, s, g))
                    if careful:
                        used = e.b.fcmp_unordered("!=", factors, e.zero())
                        values = e.b.select(used, values, e.zero())
                    with e.floats():
                        found.append(e.fma(e.converted(factors), e.converted(values), sums[g]))
                return found

            return e.loop(low, high, at_slice, zeros)

        sums = e.either(strange, lambda: slices(True), lambda: slices(False))
        first = e.mul(block, height)
        for g, value in enumerate(sums):
            with e.floats():
                value = e.fadd(value, e.load(e.at(scratch, g * e.lanes)))
            place = e.add(first, g * e.lanes)
            value = e.fadd(value, e.converted(e.load(e.at(bias, place)), FLOAT))
            e.store(activate(e, spec.activation, e.converted(value)), e.at(out, place))

    e.loop(e.low, e.high, at_block)
    return e.finish()


def _indices(e: Emitter, spec: SharedSpec, s: Value, group: int) -> Value:
    """The places of a group: a byte of each word, of which the permutation reads the low bits alone."""
    kind, share = I16 if spec.target.half else I32, packed(spec.target)
    number = e.add(e.mul(s, spec.groups // share), group // share)
    vector = ir.VectorType(kind, e.lanes)
    place = e.at(e.constants("indices"), e.mul(number, e.lanes), kind)
    words = e.b.load(place, align=kind.width // 8, typ=vector)
    shift = 8 * (group % share)
    return e.b.lshr(words, ir.Constant(vector, [shift] * e.lanes)) if shift else words


def _add_rest(e: Emitter, x: Value, scratch: Value, block: Value) -> None:
    """Add what is in no slice to the scratch sums, one product at a time."""
    weights, rows, columns = (e.constants(n) for n in ("rest_weights", "rest_rows", "rest_columns"))
    starts = e.constants("rest_starts")

    def add(k: Value, _: list[Value]) -> None:
        value = e.load_float(e.at(x, e.load_int(columns, k, I16)))
        factor = e.load_float(e.at(weights, k))
        with e.floats():
            place = e.at(scratch, e.load_int(rows, k, I16))
            product = e.b.fmul(e.converted(factor), e.converted(value))
            e.store_float(e.b.fadd(e.load_float(place), product), place)

    e.loop(e.load_int(starts, block), e.load_int(starts, e.add(block, 1)), add)


def check(op: Op, numbers: int) -> None:
    """The windows, the places in them (their high bits are ignored), and what is added one by one."""
    args, lanes = op.args, op.spec.target.lanes
    height = op.spec.groups * lanes
    starts = pointers(op, "starts", args["weights"].size // height)
    rest = pointers(op, "rest_starts", args["rest_weights"].size)
    words = int(starts[-1]) * height // op.spec.target.dtype.itemsize
    sizes = [starts.size - 1, rest.size - 1]
    fitting = args["indices"].size >= words and args["positions"].size >= starts[-1]
    if sizes != [op.units, op.units] or not fitting or args["bias"].size < op.units * height:
        raise IndexError(f"{op.node!r}: starts, positions, indices and bias have sizes that do not belong together")
    used = int(rest[-1])
    if min(args["rest_rows"].size, args["rest_columns"].size) < used:
        raise IndexError(f"{op.node!r}: rest_rows and rest_columns are shorter than rest_starts says")
    positions = args["positions"][: int(starts[-1])].astype(np.int64)
    inside(op, "positions", int(positions.min(initial=0)), 1, np.iinfo(np.int64).max)
    highest = max(int(positions.max(initial=0)) + 2 * lanes, -(-args["terms"] // lanes) * lanes)
    inside(op, "x", args["x"], args["x"] + highest, numbers)
    inside(op, "rest_rows", 0, int(args["rest_rows"][:used].max(initial=0)) + 1, height)
    inside(op, "rest_columns", 0, args["x"] + int(args["rest_columns"][:used].max(initial=0)) + 1, numbers)
    inside(op, "out", args["out"], args["out"] + op.units * height, numbers)


SHARED = Kernel("vector_shared", FIELDS, emit, check, is_layer=True)
