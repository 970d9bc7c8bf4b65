"""Sparse convolution (and, as a 1x1 convolution over tokens, sparse linear): the kernel that all of this is about.

Each nonzero weight is one broadcast and ``tile.size`` vector multiply-adds into a register tile of output pixels:

    for each tile, block of input planes, output channel:   acc += weight[k] * x[offset[k] + vectors of the tile]

Unaligned loads cross cache lines, so the nonzeros of one output channel are grouped by kernel column. A group is summed
where its inputs lie, with aligned loads only, and then the *accumulators* move sideways by the group's column, in
registers: columns left of the centre from the outermost inwards, then those right of it, then the centre itself.
Input planes come in blocks that keep a tile's inputs in the L1 cache; a block's sums wait in the output buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside, pointers
from mirrormask.runtime.kernels.emit import I16, I32, Emitter, Value
from mirrormask.runtime.kernels.tile import Tile, check_stores, tile_span

__all__ = ["FIELDS", "SPARSE", "SparseSpec", "emit"]

FIELDS = (
    "x",
    "out",
    "residual",
    "bias",
    "weights",
    "offsets",
    "starts",
    "order",
    "blocks",
    "block_stride",
    "channels",
    "flag",
)


@dataclass(frozen=True)
class SparseSpec:
    """What the code of the sparse kernel depends on; everything else it reads from its arguments.

    Attributes:
        columns: the kernel columns that occur, ascending, relative to the output pixel; ``(0,)`` with unaligned loads,
            whose offsets hold the column themselves.
        aligned: whether offsets count whole vectors (and loads are aligned) or floats.
        short: whether offsets are 16 bits wide, rather than 32.
    """

    target: Target
    tile: Tile
    columns: tuple[int, ...]
    aligned: bool
    short: bool


def emit(spec: SparseSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: output channels, in the order of ``order``."""
    e = Emitter(spec.target, name, FIELDS)
    tile, out = spec.tile, spec.tile.out
    groups = len(spec.columns)
    channels = e.field("channels")
    orders, starts, bias = (e.constants(n) for n in ("order", "starts", "bias"))
    last = e.b.sub(e.field("blocks"), e.whole(1))

    def at_tile(row: Value, column: Value) -> None:
        x_tile = e.at(e.buffer("x"), e.add(e.mul(row, tile.pitch), column))
        out_start = e.add(e.mul(row, out.pitch), column)
        out_tile = e.at(e.buffer("out"), out_start)
        residual_tile = e.at(e.buffer("residual"), out_start)
        e.loop(0, e.field("blocks"), lambda block, _: at_block(row, column, x_tile, out_tile, residual_tile, block))

    def at_block(row: Value, column: Value, x_tile: Value, out_tile: Value, residual_tile: Value, block: Value) -> None:
        x = e.at(x_tile, e.mul(block, e.field("block_stride")))
        first = e.mul(block, channels)
        is_first = e.b.icmp_signed("==", block, e.whole(0))
        is_last = e.b.icmp_signed("==", block, last)

        def at_channel(q: Value, _: list[Value]) -> None:
            row_index = e.add(first, q)
            channel = e.load_int(orders, row_index)
            plane = e.mul(channel, out.plane)
            result = e.at(out_tile, plane)
            offsets = tile.outputs(e.lanes)
            start = e.at(starts, e.mul(row_index, groups), I32)

            def from_bias() -> list[Value]:
                return [e.splat(e.load_float(e.at(bias, channel)))] * tile.size

            def from_sums() -> list[Value]:
                return [e.load(e.at(result, offset), aligned=True) for offset in offsets]

            sums = _all_columns(e, spec, x, start, e.either(is_first, from_bias, from_sums))

            def finish() -> tuple[()]:
                tile.store(e, sums, result, row, column, e.at(residual_tile, plane))
                return ()

            def wait() -> tuple[()]:
                for offset, value in zip(offsets, sums, strict=True):
                    e.store(value, e.at(result, offset), aligned=True)
                return ()

            e.either(is_last, finish, wait)

        e.loop(e.low, e.high, at_channel)

    tile.each(e, at_tile)
    return e.finish()


def _all_columns(e: Emitter, spec: SparseSpec, x: Value, start: Value, sums: list[Value]) -> list[Value]:
    """Add the sides, each from its outermost column inwards with the accumulators moving, then the centre.

    A side without nonzeros, which is frequent where few are left, is passed over with its moves.
    """
    numbered = list(enumerate(spec.columns))
    left = [pair for pair in numbered if pair[1] < 0]
    right = [pair for pair in numbered if pair[1] > 0][::-1]
    for side in filter(None, (left, right)):
        groups = sorted(group for group, _ in side)
        low, high = (e.load_int(start, e.whole(group)) for group in (groups[0], groups[-1] + 1))
        some = e.b.icmp_signed("<", low, high)
        add = partial(_add_side, e, spec, x, start, side, sums)
        sums = e.either(some, add, partial(list, sums))
    for group in (group for group, column in numbered if column == 0):
        if spec.target.half:
            # Each group is summed from zero: small sums are rounded less.
            found = _accumulate(e, spec, x, start, group, [e.zero()] * spec.tile.size)
            sums = [e.fadd(a, b) for a, b in zip(sums, found, strict=True)]
        else:
            sums = _accumulate(e, spec, x, start, group, sums)
    return sums


def _add_side(
    e: Emitter, spec: SparseSpec, x: Value, start: Value, side: list[tuple[int, int]], sums: list[Value]
) -> list[Value]:
    """``sums`` and the groups (number, column) of one side, which are summed from the outermost inwards."""
    found = [e.zero()] * spec.tile.size
    for (group, column), (_, following) in pairwise([*side, (-1, 0)]):
        found = _accumulate(e, spec, x, start, group, found)
        found = _move(e, spec, found, following - column)
    return [e.fadd(a, b) for a, b in zip(sums, found, strict=True)]


def _accumulate(e: Emitter, spec: SparseSpec, x: Value, start: Value, group: int, sums: list[Value]) -> list[Value]:
    """The inner loop: one nonzero an iteration."""
    weights, offsets = e.constants("weights"), e.constants("offsets")
    places = spec.tile.inputs(e.lanes)
    low, high = (e.load_int(start, e.whole(group + i)) for i in (0, 1))

    def nonzero(k: Value, accumulators: list[Value]) -> list[Value]:
        offset = e.load_int(offsets, k, I16 if spec.short else I32)
        source = e.at(x, e.mul(offset, e.lanes) if spec.aligned else offset)
        weight = e.splat(e.load_float(e.at(weights, k)))
        loads = [e.load(e.at(source, place), aligned=spec.aligned) for place in places]
        return [e.fma(weight, value, a) for value, a in zip(loads, accumulators, strict=True)]

    return e.loop(low, high, nonzero, sums)


def _move(e: Emitter, spec: SparseSpec, values: list[Value], by: int) -> list[Value]:
    """Move each row of the tile ``by`` lanes to the right (left if negative), with zeros coming in at its end."""
    tile, lanes, zero = spec.tile, e.lanes, e.zero()
    stride = tile.out.stride
    if tile.out.segments > 1:
        # Lane c of the result is lane c - by of the same segment, or zero (lane ``lanes`` is the zero vector's first).
        source = [c - by if 0 <= c % stride - by < stride else lanes for c in range(lanes)]
        return [e.shuffle(value, zero, source) for value in values]
    moved = []
    for i in range(tile.size):
        row, v = divmod(i, tile.vectors)
        row_values = values[row * tile.vectors : (row + 1) * tile.vectors]
        # Lane c of the result is element v * lanes + c - by of the row.
        first = v * lanes - by
        low, shift = divmod(first, lanes)
        pair = [row_values[n] if 0 <= n < tile.vectors else zero for n in (low, low + 1)]
        moved.append(e.shuffle(pair[0], pair[1], [shift + c for c in range(lanes)]))
    return moved


def check(op: Op, numbers: int) -> None:
    args, lanes, tile = op.args, op.spec.target.lanes, op.spec.tile
    channels, blocks, nonzeros = args["channels"], args["blocks"], args["weights"].size
    starts = pointers(op, "starts", nonzeros)
    rows = blocks * channels
    if starts.size != rows * len(op.spec.columns) + 1 or args["offsets"].size != nonzeros:
        raise IndexError(f"{op.node!r}: starts, offsets and weights have sizes that do not belong together")
    order = args["order"].reshape(blocks, channels)
    if not (np.sort(order, axis=1) == np.arange(channels)).all():
        raise IndexError(f"{op.node!r}: order does not name every output channel once per block")
    # Block by block: the offsets with their blocks' places added would take several times the weights' memory.
    step, span = lanes if op.spec.aligned else 1, tile_span(tile, tile.pitch, lanes)
    for block, (low, high) in enumerate(pairwise(starts[:: channels * len(op.spec.columns)].tolist())):
        if low < high:
            found, first = args["offsets"][low:high], args["x"] + block * args["block_stride"]
            inside(op, "x", first + step * int(found.min()), first + step * int(found.max()) + span, numbers)
    check_stores(op, channels, numbers)


SPARSE = Kernel("sparse", FIELDS, emit, check, is_layer=True)
