"""Every index that generated code will read, checked once when a plan is built: a wrong one would crash the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mirrormask.runtime.kernels.tile import Tile

if TYPE_CHECKING:
    from mirrormask.runtime.plan import Op

__all__ = ["check_op"]


def check_op(op: Op, numbers: int) -> None:
    """Check an op's constants against each other, and its reads and writes against an arena of ``numbers``.

    Raises:
        IndexError: something lies outside; the message names the layer and the array.
    """
    check = _CHECKS.get(op.kind)
    if check is not None:
        check(op, numbers)
    if list(op.bounds) != sorted(op.bounds) or (op.bounds and (op.bounds[0], op.bounds[-1]) != (0, op.units)):
        raise IndexError(f"{op.node!r}: the threads' shares {op.bounds} do not cover {op.units} units")


def _inside(op: Op, what: str, low: int, high: int, end: int) -> None:
    """``[low, high)`` must lie in ``[0, end)``."""
    if low < 0 or high > end:
        raise IndexError(f"{op.node!r}: {what} spans [{low}, {high}), outside [0, {end})")


def _pointers(op: Op, name: str, end: int) -> Any:
    """An array that starts at 0, never falls, and ends at or before ``end``."""
    values = op.args[name].astype(np.int64)
    if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > end:
        raise IndexError(f"{op.node!r}: {name} does not rise from 0 to at most {end}")
    return values


def _tile_span(tile: Tile, pitch: int, lanes: int) -> int:
    """Numbers from the first to past the last that the tiles of one plane touch, rows being ``pitch`` apart."""
    return (tile.out.groups - 1) * pitch + tile.out.vectors * lanes


def _stores(op: Op, channels: int, numbers: int) -> None:
    tile, lanes = op.spec.tile, op.spec.target.lanes
    halo = tile.out.origin if tile.out.segments > 1 else 0
    span = (channels - 1) * tile.out.plane + _tile_span(tile, tile.out.pitch, lanes) + halo
    for name in ("out", "residual") if tile.residual else ("out",):
        _inside(op, name, op.args[name] - halo, op.args[name] + span, numbers)
    _inside(op, "bias", 0, channels, op.args["bias"].size)


def _sparse(op: Op, numbers: int) -> None:
    args, lanes, tile = op.args, op.spec.target.lanes, op.spec.tile
    channels, blocks, nonzeros = args["channels"], args["blocks"], args["weights"].size
    starts = _pointers(op, "starts", nonzeros)
    rows = blocks * channels
    if starts.size != rows * len(op.spec.columns) + 1 or args["offsets"].size != nonzeros:
        raise IndexError(f"{op.node!r}: starts, offsets and weights have sizes that do not belong together")
    order = args["order"].reshape(blocks, channels)
    if not (np.sort(order, axis=1) == np.arange(channels)).all():
        raise IndexError(f"{op.node!r}: order does not name every output channel once per block")
    if nonzeros:
        block = np.repeat(np.arange(blocks), np.diff(starts[:: channels * len(op.spec.columns)]))
        place = args["offsets"].astype(np.int64) * (lanes if op.spec.aligned else 1) + block * args["block_stride"]
        span = _tile_span(tile, tile.pitch, lanes)
        _inside(op, "x", args["x"] + int(place.min()), args["x"] + int(place.max()) + span, numbers)
    _stores(op, channels, numbers)


def _dense(op: Op, numbers: int) -> None:
    args, lanes, tile = op.args, op.spec.target.lanes, op.spec.tile
    offsets = args["offsets"].astype(np.int64)
    span = _tile_span(tile, tile.pitch, lanes)
    _inside(op, "x", args["x"] + int(offsets.min()), args["x"] + int(offsets.max()) + span, numbers)
    if args["weights"].size < op.units * op.spec.channels * args["terms"] or offsets.size != args["terms"]:
        raise IndexError(f"{op.node!r}: weights and offsets have sizes that do not belong together")
    _stores(op, args["channels"], numbers)


def _transform(op: Op, numbers: int) -> None:
    """The rows read of every channel's phases, and the transformed ones of every tile."""
    args, spec = op.args, op.spec
    width = spec.vectors * spec.target.lanes
    first = min(band.first for band in spec.bands) * spec.pitch
    last = max(band.first + band.taps for band in spec.bands) + spec.height - 2
    planes = (op.units * len(spec.bands) - 1) * spec.plane
    _inside(op, "x", args["x"] + first, args["x"] + planes + last * spec.pitch + width, numbers)
    _inside(op, "channels", 0, op.units, spec.channels)
    _inside(op, "out", args["out"], args["out"] + (spec.tiles * spec.slots - 1) * spec.out_plane + width, numbers)


def _winograd(op: Op, numbers: int) -> None:
    args, spec, tile = op.args, op.spec, op.spec.tile
    offsets = args["offsets"].astype(np.int64)
    starts = _pointers(op, "starts", offsets.size)
    if starts.size != spec.points + 1 or args["weights"].size < op.units * spec.channels * starts[-1]:
        raise IndexError(f"{op.node!r}: weights, offsets and starts have sizes that do not belong together")
    span = (tile.row_tiles() - 1) * tile.pitch + tile.out.vectors * spec.target.lanes
    _inside(op, "x", args["x"] + int(offsets.min()), args["x"] + int(offsets.max()) + span, numbers)
    _inside(op, "rows", 0, tile.rows, tile.out.groups)
    _stores(op, args["channels"], numbers)


def _sell(op: Op, numbers: int) -> None:
    """The inputs gathered, and the outputs scattered to."""
    args, lanes = op.args, op.spec.target.lanes
    starts = _pointers(op, "starts", args["weights"].size // lanes)
    if starts.size != op.units + 1 or args["rows"].size != op.units * lanes or args["bias"].size < op.units * lanes:
        raise IndexError(f"{op.node!r}: starts, rows and bias have sizes that do not belong together")
    highest = int(args["indices"].reshape(-1)[: int(starts[-1]) * lanes].max(initial=0))
    _inside(op, "x", args["x"], args["x"] + highest + 1, numbers)
    rows = args["rows"]
    _inside(op, "out", args["out"] + int(rows.min()), args["out"] + int(rows.max()) + 1, numbers)


def _shared(op: Op, numbers: int) -> None:
    """The windows, the places in them (their high bits are ignored), and what is added one by one."""
    args, lanes = op.args, op.spec.target.lanes
    height = op.spec.groups * lanes
    starts = _pointers(op, "starts", args["weights"].size // height)
    rest = _pointers(op, "rest_starts", args["rest_weights"].size)
    words = int(starts[-1]) * height // op.spec.target.dtype.itemsize
    sizes = [starts.size - 1, rest.size - 1]
    fitting = args["indices"].size >= words and args["positions"].size >= starts[-1]
    if sizes != [op.units, op.units] or not fitting or args["bias"].size < op.units * height:
        raise IndexError(f"{op.node!r}: starts, positions, indices and bias have sizes that do not belong together")
    used = int(rest[-1])
    if min(args["rest_rows"].size, args["rest_columns"].size) < used:
        raise IndexError(f"{op.node!r}: rest_rows and rest_columns are shorter than rest_starts says")
    positions = args["positions"][: int(starts[-1])].astype(np.int64)
    _inside(op, "positions", int(positions.min(initial=0)), 1, np.iinfo(np.int64).max)
    highest = max(int(positions.max(initial=0)) + 2 * lanes, -(-args["terms"] // lanes) * lanes)
    _inside(op, "x", args["x"], args["x"] + highest, numbers)
    _inside(op, "rest_rows", 0, int(args["rest_rows"][:used].max(initial=0)) + 1, height)
    _inside(op, "rest_columns", 0, args["x"] + int(args["rest_columns"][:used].max(initial=0)) + 1, numbers)
    _inside(op, "out", args["out"], args["out"] + op.units * height, numbers)


def _vector_dense(op: Op, numbers: int) -> None:
    args, width = op.args, op.spec.panel * op.spec.target.lanes
    outputs = op.units * width
    _inside(op, "x", args["x"], args["x"] + args["terms"], numbers)
    _inside(op, "out", args["out"], args["out"] + outputs, numbers)
    _inside(op, "bias", 0, outputs, args["bias"].size)
    _inside(op, "weights", 0, outputs * args["terms"], args["weights"].size)


def _clear(op: Op, numbers: int) -> None:
    out, spec = op.args["out"], op.spec
    _inside(op, "out", out - spec.margin, out + op.units * spec.layout.plane, numbers)


_CHECKS = {
    "sparse": _sparse,
    "dense": _dense,
    "transform": _transform,
    "winograd": _winograd,
    "vector_sparse": _sell,
    "vector_shared": _shared,
    "vector_dense": _vector_dense,
    "clear": _clear,
}
