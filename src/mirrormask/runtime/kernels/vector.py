"""Linear layers on a single vector (batch 1): sparse in SELL form, dense in panels.

SELL: rows are sorted by their number of nonzeros and taken ``lanes`` at a time; slice ``s`` of such a group holds at
most one nonzero of each row, so that a group is ``acc += weight[s] * x[index[s]]`` with one gather a slice.

Gathers are slow, hence AVX-512 does better: slice ``s`` has a window of ``2 * lanes`` consecutive inputs (two
registers), from which one permutation fetches its elements. A row without a nonzero in the window waits
for a later slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from mirrormask.runtime.emit import FLOAT, I8, I16, I32, Emitter, Value
from mirrormask.runtime.kernels.activation import activate
from mirrormask.runtime.targets import Target

__all__ = [
    "DENSE_FIELDS",
    "SPARSE_FIELDS",
    "WINDOW_FIELDS",
    "VectorSpec",
    "emit_dense",
    "emit_sparse",
    "emit_windows",
    "pack_sell",
    "pack_windows",
]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

WINDOW_FIELDS = ("x", "out", "bias", "weights", "indices", "windows", "starts", "rows", "flag")
SPARSE_FIELDS = ("x", "out", "bias", "weights", "indices", "starts", "rows", "flag")
DENSE_FIELDS = ("x", "out", "bias", "weights", "terms", "flag")


@dataclass(frozen=True)
class VectorSpec:
    """What the code depends on: ``panel`` vectors of outputs at a time in the dense kernel."""

    target: Target
    activation: str
    panel: int = 1


def pack_sell(
    weight: npt.NDArray[np.float32], lanes: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Weights and column indices ``[slices, lanes]``, the first slice of each group, and the row behind each lane.

    Rows that fill up the last group are numbered from ``outputs`` on, in the margin behind the result.
    """
    outputs = weight.shape[0]
    counts = np.count_nonzero(weight, axis=1)
    rows = np.argsort(-counts, kind="stable")
    rows = np.concatenate([rows, np.arange(outputs, -(-outputs // lanes) * lanes)])
    slices = np.array([counts[g[g < outputs]].max(initial=0) for g in rows.reshape(-1, lanes)])
    starts = np.concatenate([[0], np.cumsum(slices)]).astype(np.int32)
    values = np.zeros((starts[-1] + 1, lanes), np.float32)
    indices = np.zeros((starts[-1] + 1, lanes), np.uint16)
    row, column = np.nonzero(weight)
    place = np.empty(outputs, np.int64)
    place[rows[rows < outputs]] = np.flatnonzero(rows < outputs)
    rank = np.arange(len(row)) - np.concatenate([[0], np.cumsum(counts)])[row]
    slot = starts[place[row] // lanes] + rank
    values[slot, place[row] % lanes] = weight[row, column]
    indices[slot, place[row] % lanes] = column
    return values, indices, starts, rows.astype(np.int32)


def pack_windows(weight: Floats, lanes: int) -> tuple[Floats, npt.NDArray[np.uint8], Ints, Ints, Ints]:
    """Weights and indices ``[slices, lanes]``, each slice's window, each group's first slice, the row of each lane.

    All groups are packed side by side: each slice starts its window at the first input that any of its rows still
    needs, rounded down to a whole vector, and serves every row whose next nonzero lies in it.
    """
    outputs = weight.shape[0]
    counts = np.count_nonzero(weight, axis=1)
    rows = np.argsort(-counts, kind="stable")
    rows = np.concatenate([rows, np.arange(outputs, -(-outputs // lanes) * lanes)])
    end = np.iinfo(np.int64).max // 2
    columns = np.full((len(rows), counts.max(initial=0) + 1), end)
    values = np.zeros(columns.shape, np.float32)
    row, column = np.nonzero(weight)
    rank = np.arange(len(row)) - np.concatenate([[0], np.cumsum(counts)])[row]
    columns[row, rank], values[row, rank] = column, weight[row, column]
    wanted, given = (table[rows].reshape(len(rows) // lanes, lanes, -1) for table in (columns, values))
    group, lane = np.indices(wanted.shape[:2])
    place = np.zeros(wanted.shape[:2], np.int64)
    steps = []
    while True:
        following = wanted[group, lane, place]
        start = following.min(1) // lanes * lanes
        active = following.min(1) < end
        if not active.any():
            break
        taken = (following - start[:, None] < 2 * lanes) & active[:, None]
        weights = np.where(taken, given[group, lane, place], 0)
        indices = np.where(taken, following - start[:, None], 0)
        place += taken
        steps.append((np.flatnonzero(active), weights[active], indices[active], start[active]))
    slices = np.zeros(len(wanted), np.int64)
    for groups, *_ in steps:
        slices[groups] += 1
    slices += slices % 2  # the kernel takes two at a time; an empty slice changes nothing
    starts = np.concatenate([[0], np.cumsum(slices)])
    all_weights = np.zeros((starts[-1] + 1, lanes), np.float32)
    all_indices = np.zeros((starts[-1] + 1, lanes), np.uint8)
    windows = np.zeros(starts[-1] + 1, np.int32)
    for step, (groups, weights, indices, start) in enumerate(steps):
        slot = starts[groups] + step
        all_weights[slot], all_indices[slot], windows[slot] = weights, indices, start
    return all_weights, all_indices, windows, starts.astype(np.int32), rows.astype(np.int32)


def _add_product(e: Emitter, a: Value, b: Value, total: Value) -> Value:
    """``total + a * b`` with 32-bit sums: the sums of these layers are long, and memory is what bounds them."""
    with e.floats():
        return e.fma(e.converted(a), e.converted(b), total)


def emit_windows(spec: VectorSpec, name: str) -> str:
    """The window kernel's LLVM IR, for AVX-512. Work unit: groups of ``lanes`` rows."""
    e = Emitter(spec.target, name, WINDOW_FIELDS)
    x, out = e.buffer("x"), e.buffer("out")
    bias, weights, indices, windows, starts, rows = (e.constants(n) for n in WINDOW_FIELDS[2:-1])

    def at_group(group: Value, _: list[Value]) -> None:
        first = e.mul(group, e.lanes)

        def product(s: Value, total: Value) -> Value:
            place = e.mul(s, e.lanes)
            table = e.at(x, e.load_int(windows, s))
            low, high = e.load(table), e.load(e.at(table, e.lanes))
            return _add_product(
                e, e.load(e.at(weights, place), aligned=True), e.pick(low, high, e.at(indices, place, I8)), total
            )

        def two_slices(s: Value, sums: list[Value]) -> list[Value]:
            return [product(s, sums[0]), product(e.add(s, 1), sums[1])]

        low, high = e.load_int(starts, group), e.load_int(starts, e.add(group, 1))
        start = e.converted(e.load(e.at(bias, first)), FLOAT)
        a, b = e.loop(low, high, two_slices, [start, ir.Constant(start.type, [0.0] * e.lanes)], step=2)
        e.scatter(activate(e, spec.activation, e.converted(e.fadd(a, b))), out, e.at(rows, first, I32))

    e.loop(e.low, e.high, at_group)
    return e.finish()


def emit_sparse(spec: VectorSpec, name: str) -> str:
    """The SELL kernel's LLVM IR. Work unit: groups of ``lanes`` rows."""
    e = Emitter(spec.target, name, SPARSE_FIELDS)
    x, out = e.buffer("x"), e.buffer("out")
    bias, weights, indices, starts, rows = (e.constants(n) for n in SPARSE_FIELDS[2:-1])

    def at_group(group: Value, _: list[Value]) -> None:
        first = e.mul(group, e.lanes)

        def slice_(s: Value, sums: list[Value]) -> list[Value]:
            place = e.mul(s, e.lanes)
            value = e.gather(x, e.at(indices, place, I16), I16)
            return [e.fma(e.load(e.at(weights, place), aligned=True), value, sums[0])]

        (sums,) = e.loop(
            e.load_int(starts, group), e.load_int(starts, e.add(group, 1)), slice_, [e.load(e.at(bias, first))]
        )
        e.scatter(activate(e, spec.activation, sums), out, e.at(rows, first, I32))

    e.loop(e.low, e.high, at_group)
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

    def at_panel(panel: Value, _: list[Value]) -> None:
        first = e.mul(panel, width)
        rows = e.at(weights, e.mul(first, terms))

        def term(k: Value, sums: list[Value]) -> list[Value]:
            value, row = e.splat(e.load_float(e.at(x, k))), e.at(rows, e.mul(k, width))
            return [
                _add_product(e, value, e.load(e.at(row, p), aligned=True), s) for p, s in zip(places, sums, strict=True)
            ]

        start = [e.converted(e.load(e.at(bias, e.add(first, p))), FLOAT) for p in places]
        for p, value in zip(places, e.loop(0, terms, term, start), strict=True):
            e.store(activate(e, spec.activation, e.converted(value)), e.at(out, e.add(first, p)))

    e.loop(e.low, e.high, at_panel)
    return e.finish()
