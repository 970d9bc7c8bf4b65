"""Linear layers on a single vector (batch 1): sparse in SELL form, dense in panels.

SELL: rows are sorted by their number of nonzeros and taken ``lanes`` at a time; slice ``s`` of such a group holds at
most one nonzero of each row, so that a group is ``acc += weight[s] * x[index[s]]`` with one gather a slice.

With 8-bit weights the slices hold levels, and each row has a scale: ``out = scale * acc + bias``. Levels, and weights
of 16 bits, become floats in registers; sums are of 32 bits. A weight and its index take 3 or 4 bytes instead of 6.

Gathers are slow; AVX-512 does better with :mod:`mirrormask.runtime.kernels.shared`.
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
from mirrormask.runtime.kernels.emit import FLOAT, HALF, I8, I16, I32, Emitter, Value

__all__ = [
    "DENSE_FIELDS",
    "PANEL",
    "SELL",
    "SPARSE_FIELDS",
    "VectorSpec",
    "check_stored",
    "emit_dense",
    "emit_sparse",
    "holds_strange",
    "pack_sell",
    "stored_factors",
]

Ints = npt.NDArray[np.int64]

SPARSE_FIELDS = ("x", "out", "bias", "weights", "indices", "starts", "rows", "scales", "terms", "flag")
DENSE_FIELDS = ("x", "out", "bias", "weights", "terms", "flag")


@dataclass(frozen=True)
class VectorSpec:
    """What the code depends on: ``panel`` vectors of outputs at a time in the dense kernel.

    Attributes:
        weights: what the sparse kernel's are stored as: ``"fp32"`` (numbers of the target), ``"int8"`` (levels) or
            ``"fp16"``.
    """

    target: Target
    activation: Chain
    panel: int = 1
    weights: str = "fp32"


def pack_sell(
    counts: Ints,
    nonzeros: Iterable[tuple[Ints, Ints, npt.NDArray[Any]]],
    lanes: int,
    zeros: Callable[[int], npt.NDArray[Any]],
) -> dict[str, npt.NDArray[Any]]:
    """The constants of a layer, by field name.

    Args:
        counts: the nonzeros of each row.
        nonzeros: (row, column, value) of them, in order, in as many parts as there may be; no row is in two.
        zeros: makes the array of so many weights.

    Returns:
        weights, indices: of ``[slices, lanes]`` and one more slice; weights and columns.
        starts: the first slice of each group, and the end.
        rows: the row behind each lane. Those that fill up the last group are numbered from ``outputs`` on, in the
            margin behind the result.
    """
    outputs = len(counts)
    rows = np.argsort(-counts, kind="stable")
    rows = np.concatenate([rows, np.arange(outputs, -(-outputs // lanes) * lanes)])
    slices = np.array([counts[g[g < outputs]].max(initial=0) for g in rows.reshape(-1, lanes)])
    starts = np.concatenate([[0], np.cumsum(slices)]).astype(np.int32)
    size = (int(starts[-1]) + 1) * lanes
    weights, indices = zeros(size), np.zeros(size, np.uint16)
    place = np.empty(outputs, np.int64)
    place[rows[rows < outputs]] = np.flatnonzero(rows < outputs)
    before = np.cumsum(counts) - counts
    done = 0
    for row, column, values in nonzeros:
        rank = np.arange(done, done + len(row)) - before[row]
        slot = (starts[place[row] // lanes] + rank) * lanes + place[row] % lanes
        weights[slot], indices[slot] = values, column
        done += len(row)
    return {"weights": weights, "indices": indices, "starts": starts, "rows": rows.astype(np.int32)}


def _add_product(e: Emitter, a: Value, b: Value, total: Value) -> Value:
    """``total + a * b`` with 32-bit sums: the sums of these layers are long, and memory is what bounds them."""
    with e.floats():
        return e.fma(e.converted(a), e.converted(b), total)


def stored_factors(e: Emitter, stored: str, weights: Value, lanes: int) -> Callable[[Value], tuple[Value, Value]]:
    """A function of a place among stored weights: the factors there as numbers, and which of them are not zero.

    Args:
        stored: ``"fp32"``, ``"int8"`` or ``"fp16"``, see :class:`VectorSpec`.
        weights: the address of the first.
        lanes: how many factors.
    """
    small = ir.VectorType(I8, lanes)

    def levels_at(place: Value) -> tuple[Value, Value]:
        found = e.b.load(e.at(weights, place, I8), align=1, typ=small)
        return e.b.sitofp(found, e.vector_type(lanes)), e.b.icmp_signed("!=", found, ir.Constant(small, None))

    def halves_at(place: Value) -> tuple[Value, Value]:
        with e.numbers(HALF):
            found = e.load(e.at(weights, place), lanes)
        factors = e.converted(found)
        return factors, e.b.fcmp_unordered("!=", factors, e.zero(lanes))

    def weights_at(place: Value) -> tuple[Value, Value]:
        found = e.load(e.at(weights, place), lanes, aligned=True)
        return found, e.b.fcmp_unordered("!=", found, e.zero(lanes))

    return {"int8": levels_at, "fp16": halves_at, "fp32": weights_at}[stored]


def holds_strange(e: Emitter, x: Value) -> Value:
    """Whether the input (or the rest of its last vector) holds NaN or infinity: times zero, added up, that is NaN."""

    def add(i: Value, sums: list[Value]) -> list[Value]:
        return [e.fadd(sums[0], e.fmul(e.load(e.at(x, i)), e.zero()))]

    (sums,) = e.loop(0, e.field("terms"), add, [e.zero()], step=e.lanes)
    total = e.total(e.converted(sums, FLOAT))
    return e.b.fcmp_unordered("uno", total, total)


def emit_sparse(spec: VectorSpec, name: str) -> str:
    """The SELL kernel's LLVM IR. Work unit: groups of ``lanes`` rows."""
    e = Emitter(spec.target, name, SPARSE_FIELDS)
    x, out = e.buffer("x"), e.buffer("out")
    bias, weights, indices, starts, rows, scales = (e.constants(n) for n in SPARSE_FIELDS[2:8])
    factors_at = stored_factors(e, spec.weights, weights, e.lanes)
    scaled = spec.weights == "int8"

    def at_group(careful: bool, group: Value) -> None:
        first = e.mul(group, e.lanes)

        def slice_(s: Value, sums: list[Value]) -> list[Value]:
            place = e.mul(s, e.lanes)
            factors, used = factors_at(place)
            value = e.gather(x, e.at(indices, place, I16), I16)
            if careful:
                value = e.b.select(used, value, e.zero())
            return [e.fma(factors, value, sums[0])]

        added = e.load(e.at(bias, first))
        start = e.zero() if scaled else added
        (sums,) = e.loop(e.load_int(starts, group), e.load_int(starts, e.add(group, 1)), slice_, [start])
        if scaled:
            sums = e.fma(sums, e.load(e.at(scales, first)), added)
        e.scatter(activate(e, spec.activation, sums), out, e.at(rows, first, I32))

    def groups(careful: bool) -> list[Value]:
        return e.loop(e.low, e.high, lambda group, _: at_group(careful, group))

    # Slots without a nonzero must not make NaN of an infinite input.
    e.either(holds_strange(e, x), lambda: groups(True), lambda: groups(False))
    return e.finish()


def emit_dense(spec: VectorSpec, name: str) -> str:
    """The dense kernel's LLVM IR: ``panel`` vectors of outputs at a time. Work unit: panels."""
    e = Emitter(spec.target, name, DENSE_FIELDS)
    x, out, bias, weights, terms = (
        e.buffer("x"),
        e.buffer("out"),
        e.constants("bias"),
        e.constants("weights"),
        e.field("terms"),
    )
    width = spec.panel * e.lanes
    places = [i * e.lanes for i in range(spec.panel)]
    # Few vectors would wait for each other's sums: take several terms at a time, each with sums of its own.
    copies = max(1, 8 // spec.panel)
    whole = e.b.and_(terms, e.whole(-copies))

    def at_panel(panel: Value, _: list[Value]) -> None:
        first = e.mul(panel, width)
        rows = e.at(weights, e.mul(first, terms))

        def term(k: Value, sums: list[Value]) -> list[Value]:
            value, row = e.splat(e.load_float(e.at(x, k))), e.at(rows, e.mul(k, width))
            loads = [e.load(e.at(row, p), aligned=True) for p in places]
            return [_add_product(e, value, load, total) for load, total in zip(loads, sums, strict=True)]

        def several(k: Value, sums: list[Value]) -> list[Value]:
            size = spec.panel
            return [v for i in range(copies) for v in term(e.add(k, i), sums[i * size : (i + 1) * size])]

        start = [e.converted(e.load(e.at(bias, e.add(first, p))), FLOAT) for p in places]
        nothing = [ir.Constant(value.type, [0.0] * e.lanes) for value in start]
        parts = e.loop(0, whole, several, start + nothing * (copies - 1), step=copies)
        sums = parts[: spec.panel]
        for i in range(spec.panel, len(parts)):
            sums[i % spec.panel] = e.fadd(sums[i % spec.panel], parts[i])
        for p, value in zip(places, e.loop(whole, terms, term, sums), strict=True):
            e.store(activate(e, spec.activation, e.converted(value)), e.at(out, e.add(first, p)))

    e.loop(e.low, e.high, at_panel)
    return e.finish()


def check_sparse(op: Op, numbers: int) -> None:
    """The inputs gathered, and the outputs scattered to."""
    args, lanes = op.args, op.spec.target.lanes
    starts = pointers(op, "starts", args["weights"].size // lanes)
    if starts.size != op.units + 1 or args["rows"].size != op.units * lanes or args["bias"].size < op.units * lanes:
        raise IndexError(f"{op.node!r}: starts, rows and bias have sizes that do not belong together")
    check_stored(op, lanes)
    highest = int(args["indices"].reshape(-1)[: int(starts[-1]) * lanes].max(initial=0))
    read = max(highest + 1, -(-args["terms"] // lanes) * lanes)
    inside(op, "x", args["x"], args["x"] + read, numbers)
    rows = args["rows"]
    inside(op, "out", args["out"] + int(rows.min()), args["out"] + int(rows.max()) + 1, numbers)


def check_stored(op: Op, lanes: int) -> None:
    """The type of the weights, and the scales that go with levels, of groups of ``lanes`` rows."""
    args, found = op.args, {"int8": np.int8, "fp16": np.float16, "fp32": op.spec.target.dtype}
    stored = np.dtype(found[op.spec.weights])
    if args["weights"].dtype != stored or (stored == np.int8 and args["scales"].size < op.units * lanes):
        raise IndexError(f"{op.node!r}: weights are not {stored}, or scales are fewer than rows")


def check_dense(op: Op, numbers: int) -> None:
    args, width = op.args, op.spec.panel * op.spec.target.lanes
    outputs = op.units * width
    inside(op, "x", args["x"], args["x"] + args["terms"], numbers)
    inside(op, "out", args["out"], args["out"] + outputs, numbers)
    inside(op, "bias", 0, outputs, args["bias"].size)
    inside(op, "weights", 0, outputs * args["terms"], args["weights"].size)


SELL = Kernel("vector_sparse", SPARSE_FIELDS, emit_sparse, check_sparse, is_layer=True)
PANEL = Kernel("vector_dense", DENSE_FIELDS, emit_dense, check_dense, is_layer=True)
