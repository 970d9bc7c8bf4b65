"""Direct dense convolution, for layers that stay dense: ``channels`` output channels x one tile of pixels in registers.

    for each tile, group of output channels, k:   acc[j] += weight[k, j] * x[offset[k] + vectors of the tile]

Loads are unaligned, yet each serves several multiply-adds, so that their cost does not show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import I32, Emitter, Value
from mirrormask.runtime.kernels.tile import Tile, check_stores, tile_span

__all__ = ["CHUNK", "DENSE", "FIELDS", "DenseSpec", "emit", "multiply_add", "pack"]

#: Terms that are summed together in half precision.
CHUNK = 16

FIELDS = ("x", "out", "residual", "bias", "weights", "offsets", "terms", "channels", "flag")


@dataclass(frozen=True)
class DenseSpec:
    """What the code depends on: the tile, and how many output channels share each load."""

    target: Target
    tile: Tile
    channels: int


def pack(weight: npt.NDArray[Any], channels: int, into: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """``[outputs, terms] -> [ceil(outputs / channels), terms, channels]``, the missing outputs being zero.

    Args:
        into: an array of zeros of that shape, to be filled; a new one by default.
    """
    outputs, terms = weight.shape
    groups, whole = -(-outputs // channels), outputs // channels
    packed = np.zeros((groups, terms, channels), np.float32) if into is None else into
    packed[:whole] = weight[: whole * channels].reshape(whole, channels, terms).transpose(0, 2, 1)
    packed[whole:, :, : outputs - whole * channels] = weight[whole * channels :].T
    return packed


def multiply_add(
    e: Emitter, x: Value, offsets: Value, panel: Value, channels: int, places: list[int]
) -> Callable[[Value, list[Value]], list[Value]]:
    """The body of the loop over terms: term ``k`` of ``channels`` output channels, whose weights are in ``panel``."""

    def term(k: Value, sums: list[Value]) -> list[Value]:
        source = e.at(x, e.b.sext(e.b.load(e.at(offsets, k, I32), typ=I32), k.type))
        values = [e.load(e.at(source, place)) for place in places]
        row_weights = e.at(panel, e.mul(k, channels))
        result = []
        for j in range(channels):
            weight = e.splat(e.load_float(e.at(row_weights, j)))
            mine = sums[j * len(places) : (j + 1) * len(places)]
            result += [e.fma(weight, value, a) for value, a in zip(values, mine, strict=True)]
        return result

    return term


def _in_chunks(e: Emitter, terms: Value, term: Callable[..., list[Value]], start: list[Value]) -> list[Value]:
    """The sum of all terms by way of sums of :data:`CHUNK` of them: half precision rounds small sums less."""

    def chunk(first: Value, sums: list[Value]) -> list[Value]:
        end = e.minimum(e.add(first, CHUNK), terms)
        part = e.loop(first, end, term, [e.zero()] * len(sums))
        return [e.fadd(a, b) for a, b in zip(sums, part, strict=True)]

    return e.loop(0, terms, chunk, start, step=CHUNK)


def emit(spec: DenseSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: groups of ``spec.channels`` output channels."""
    e = Emitter(spec.target, name, FIELDS)
    tile, out, channels = spec.tile, spec.tile.out, spec.channels
    places = tile.inputs(e.lanes)
    weights, offsets, bias, terms = (
        e.constants("weights"),
        e.constants("offsets"),
        e.constants("bias"),
        e.field("terms"),
    )

    def at_tile(row: Value, column: Value) -> None:
        x = e.at(e.buffer("x"), e.add(e.mul(row, tile.pitch), column))
        start = e.add(e.mul(row, out.pitch), column)
        out_tile, residual_tile = e.at(e.buffer("out"), start), e.at(e.buffer("residual"), start)

        def at_group(group: Value, _: list[Value]) -> None:
            first = e.mul(group, channels)
            panel = e.at(weights, e.mul(first, terms))
            biases = [e.splat(e.load_float(e.at(bias, e.add(first, j)))) for j in range(channels)]

            term = multiply_add(e, x, offsets, panel, channels, places)
            start = [b for b in biases for _ in range(tile.size)]
            sums = _in_chunks(e, terms, term, start) if spec.target.half else e.loop(0, terms, term, start)
            for j in range(channels):
                channel = e.add(first, j)
                mine = sums[j * tile.size : (j + 1) * tile.size]

                def put(channel: Value = channel, mine: list[Value] = mine) -> None:
                    plane = e.mul(channel, out.plane)
                    tile.store(e, mine, e.at(out_tile, plane), row, column, e.at(residual_tile, plane))

                # The last group may have channels to spare.
                put() if j == 0 else e.when(e.b.icmp_signed("<", channel, e.field("channels")), put)

        e.loop(e.low, e.high, at_group)

    tile.each(e, at_tile)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    args, lanes, tile = op.args, op.spec.target.lanes, op.spec.tile
    offsets = args["offsets"].astype(np.int64)
    span = tile_span(tile, tile.pitch, lanes)
    inside(op, "x", args["x"] + int(offsets.min()), args["x"] + int(offsets.max()) + span, numbers)
    if args["weights"].size < op.units * op.spec.channels * args["terms"] or offsets.size != args["terms"]:
        raise IndexError(f"{op.node!r}: weights and offsets have sizes that do not belong together")
    check_stores(op, args["channels"], numbers)


DENSE = Kernel("dense", FIELDS, emit, check, is_layer=True)
