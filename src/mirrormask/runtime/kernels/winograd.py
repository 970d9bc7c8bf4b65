"""Dense convolution with fewer multiplications: Winograd's minimal filtering, down the columns alone.

``m`` output rows of a filter of ``r`` rows take ``n = m + r - 1`` products instead of ``m r`` (F(m, r) of Lavin and
Gray, arXiv 1509.09308, eq. 6):

    y = A ((G g) * (B d))      d: [n] input rows, g: [r] filter rows, y: [m] output rows; ``*`` element by element

``G g`` is computed when the plan is built, ``B d`` once for all output channels (:func:`emit_transform`). The sums
over channels and kernel columns run between, at each of the ``n`` points by itself, as a direct convolution of one row.
``A`` and ``B`` only add whole rows to each other, so that no number leaves its lane. Along the columns too it would
save more, but lanes would have to be rearranged.

A strided filter is one filter per phase of its rows, of ``r`` or ``r - 1`` rows each. ``A`` depends on the points
alone: the shorter filter leaves one out, and their products are summed before ``A``.

Numbers that are not finite spread over the rows of a tile, also to those that the filter does not connect them to: the
kernel notes them in ``flag``, and a region (``model/region``) runs such inputs again with direct kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside, pointers
from mirrormask.runtime.kernels.dense import multiply_add
from mirrormask.runtime.kernels.emit import Emitter, Value
from mirrormask.runtime.kernels.tile import Tile, check_stores

__all__ = [
    "FIELDS",
    "MOST_POINTS",
    "MOST_ROWS",
    "TRANSFORM",
    "TRANSFORM_FIELDS",
    "WINOGRAD",
    "Band",
    "TransformSpec",
    "WinogradSpec",
    "emit",
    "emit_transform",
    "matrices",
]

FIELDS = ("x", "out", "residual", "bias", "weights", "offsets", "starts", "channels", "flag")
TRANSFORM_FIELDS = ("x", "out")

#: The finite points, in the order in which they are taken; infinity is the last point of every filter. Of what was
#: tried, 1/2 and 2 before 1 round least with the four to seven points that tiles of :data:`MOST_ROWS` have.
POINTS = (0.0, 0.5, -0.5, 2.0, -2.0, 1.0)
#: Points of one filter, and output rows of a tile: with more the numbers between grow until digits are lost.
MOST_POINTS, MOST_ROWS = len(POINTS) + 1, 4

Floats = npt.NDArray[np.float64]


def matrices(rows: int, taps: int) -> tuple[Floats, Floats, Floats]:
    """``A [rows, n]``, ``G [n, taps]`` and ``B [n, n]`` of F(rows, taps), ``n = rows + taps - 1``.

    Toom and Cook's: the polynomials are evaluated at ``n - 1`` of :data:`POINTS` and at infinity.

    Raises:
        ValueError: ``n`` is above :data:`MOST_POINTS`.
    """
    count = rows + taps - 1
    if count > MOST_POINTS:
        raise ValueError(f"{rows} rows of {taps} taps need {count} points, and there are {MOST_POINTS}")
    points = POINTS[: count - 1]
    a, g, b = np.zeros((rows, count)), np.zeros((count, taps)), np.zeros((count, count))
    for i, point in enumerate(points):
        others = [other for other in points if other != point]
        a[:, i] = point ** np.arange(rows)
        g[i] = point ** np.arange(taps) / np.prod([point - other for other in others])
        b[i, : count - 1] = np.atleast_1d(np.poly(others))[::-1]
    a[-1, -1] = g[-1, -1] = 1.0
    b[-1] = np.atleast_1d(np.poly(points))[::-1]
    return a, g, b


@dataclass(frozen=True)
class Band:
    """The rows of one phase that a filter reads: the first one, relative to the output's, and how many taps it has."""

    first: int
    taps: int


@dataclass(frozen=True)
class TransformSpec:
    """What the code of ``B d`` depends on.

    Attributes:
        rows: output rows of a tile.
        height: output rows in all; the last tile overlaps the one before it.
        bands: of each phase of an input channel.
        pitch, plane, vectors: of the input: floats from row to row, from plane to plane; vectors of a row.
        out_plane: floats from one transformed row to the next.
        channels: input channels.
    """

    target: Target
    rows: int
    height: int
    bands: tuple[Band, ...]
    pitch: int
    plane: int
    vectors: int
    out_plane: int
    channels: int

    @property
    def taps(self) -> int:
        """Rows of the longest filter."""
        return max(band.taps for band in self.bands)

    @property
    def points(self) -> int:
        """Points of the longest filter."""
        return self.rows + self.taps - 1

    @property
    def tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.height // self.rows)

    def at(self, band: int) -> list[int]:
        """The points at which a band is taken: the first ones, and infinity."""
        return [*range(self.rows + self.bands[band].taps - 2), self.points - 1]

    def place(self, point: int, band: int) -> tuple[int, int]:
        """Which of a tile's transformed rows belongs to a point of the first channel's band, and how many further the
        next channel's lies. The rows of a point are neighbours."""
        having = [[p in self.at(b) for b in range(len(self.bands))] for p in range(point + 1)]
        before = self.channels * sum(map(sum, having[:-1]))
        return before + sum(having[-1][:band]), sum(having[-1])

    @property
    def slots(self) -> int:
        """Transformed rows of a tile."""
        return self.channels * sum(len(self.at(band)) for band in range(len(self.bands)))

    @property
    def step(self) -> int:
        """Floats from one tile's transformed rows to the next one's."""
        return self.slots * self.out_plane


def emit_transform(spec: TransformSpec, name: str) -> str:
    """The LLVM IR of ``B d`` for every tile, plane and column. Work unit: input channels."""
    e = Emitter(spec.target, name, TRANSFORM_FIELDS)
    last = e.whole(spec.height - spec.rows)

    def at_tile(channel: Value, tile: Value) -> None:
        row = e.minimum(e.mul(tile, spec.rows), last)
        planes = e.at(e.buffer("x"), e.mul(channel, spec.plane * len(spec.bands)))
        rows = e.at(planes, e.mul(row, spec.pitch))
        out = e.at(e.buffer("out"), e.mul(tile, spec.step))
        for number, band in enumerate(spec.bands):
            b = matrices(spec.rows, band.taps)[2]
            source = e.at(rows, number * spec.plane + band.first * spec.pitch)
            slots = [
                e.add(e.mul(channel, step), first) for first, step in (spec.place(p, number) for p in spec.at(number))
            ]
            results = [e.at(out, e.mul(slot, spec.out_plane)) for slot in slots]

            def at_vector(
                column: Value, _: list[Value], b: Floats = b, source: Value = source, results: list[Value] = results
            ) -> None:
                values = [e.load(e.at(e.at(source, column), i * spec.pitch)) for i in range(len(b))]
                for line, result in zip(b, results, strict=True):
                    e.store(_combined(e, line, values), e.at(result, column))

            e.loop(0, spec.vectors * e.lanes, at_vector, step=e.lanes)

    e.loop(e.low, e.high, lambda c, _: e.loop(0, spec.tiles, lambda t, _: at_tile(c, t)))
    return e.finish()


@dataclass(frozen=True)
class WinogradSpec:
    """What the code of the sums and of ``A`` depends on.

    Attributes:
        tile: ``tile.rows`` output rows; ``tile.pitch`` is :attr:`TransformSpec.step`.
        channels: output channels that share each load.
        taps: rows of the longest filter.
    """

    target: Target
    tile: Tile
    channels: int
    taps: int

    @property
    def points(self) -> int:
        """Points of the longest filter."""
        return self.tile.rows + self.taps - 1


def emit(spec: WinogradSpec, name: str) -> str:
    """The LLVM IR of the sums at each point, and of ``A``. Work unit: groups of ``spec.channels`` output channels."""
    e = Emitter(spec.target, name, FIELDS)
    tile, out, channels, points = spec.tile, spec.tile.out, spec.channels, spec.points
    rows, vectors = tile.rows, tile.vectors
    a = matrices(rows, spec.taps)[0]
    weights, offsets, bias, starts = (e.constants(n) for n in ("weights", "offsets", "bias", "starts"))
    places = [v * e.lanes for v in range(vectors)]
    products = e.scratch(points * channels * vectors * e.lanes)
    terms = e.load_int(starts, e.whole(points))

    def at_tile(row: Value, column: Value) -> None:
        # The last tile may begin before a multiple of ``rows``.
        number = e.b.udiv(e.add(row, rows - 1), e.whole(rows))
        x = e.at(e.buffer("x"), e.add(e.mul(number, tile.pitch), column))
        start = e.add(e.mul(row, out.pitch), column)
        out_tile, residual_tile = e.at(e.buffer("out"), start), e.at(e.buffer("residual"), start)

        def at_group(group: Value, _: list[Value]) -> None:
            first = e.mul(group, channels)
            panel = e.at(weights, e.mul(first, terms))

            def at_point(point: Value, _: list[Value]) -> None:
                low, high = (e.load_int(starts, e.add(point, i)) for i in (0, 1))
                zeros = [e.zero()] * (channels * vectors)
                sums = e.loop(low, high, multiply_add(e, x, offsets, panel, channels, places), zeros)
                to = e.at(products, e.mul(point, channels * vectors * e.lanes))
                for i, value in enumerate(sums):
                    e.store(value, e.at(to, i * e.lanes))

            e.loop(0, points, at_point)

            def at_channel(j: Value, _: list[Value]) -> None:
                channel = e.add(first, j)
                shift = e.splat(e.load_float(e.at(bias, channel)))
                mine = e.at(products, e.mul(j, vectors * e.lanes))
                values = [e.zero()] * tile.size
                for v in range(vectors):
                    at = [(p * channels * vectors + v) * e.lanes for p in range(points)]
                    values[v::vectors] = _combined_rows(e, a, [e.load(e.at(mine, i)) for i in at], shift)
                e.note_unless_finite(values)
                plane = e.mul(channel, out.plane)
                tile.store(e, values, e.at(out_tile, plane), row, column, e.at(residual_tile, plane))

            # The last group may have channels to spare.
            e.loop(0, e.minimum(e.whole(channels), e.b.sub(e.field("channels"), first)), at_channel)

        e.loop(e.low, e.high, at_group)

    tile.each(e, at_tile)
    return e.finish()


def _combined(e: Emitter, line: Floats, values: list[Value], start: Value = None) -> Value:
    """``start + sum of line[i] * values[i]``; zeros are passed over, and ones not multiplied."""
    total = start
    for factor, value in zip(line, values, strict=True):
        if factor == 0:
            continue
        if total is None:
            total = value if factor == 1 else e.fmul(value, e.splat(float(factor)))
        elif factor == 1:
            total = e.fadd(total, value)
        elif factor == -1:
            total = e.b.fsub(total, value)
        else:
            total = e.fma(value, e.splat(float(factor)), total)
    return total


def _combined_rows(e: Emitter, a: Floats, values: list[Value], shift: Value) -> list[Value]:
    """``shift + A values``; even and odd rows use sums and differences of the points ``p`` and ``-p``."""
    finite = len(values) - 1
    pairs = [i for i in range(1, finite - 1, 2) if POINTS[i] == -POINTS[i + 1]]
    sums = {i: e.fadd(values[i], values[i + 1]) for i in pairs}
    differences = {i: e.b.fsub(values[i], values[i + 1]) for i in pairs}
    second = {i + 1 for i in pairs}
    results = []
    for j, line in enumerate(a):
        of_pair = differences if j % 2 else sums
        kept = [i for i in range(len(values)) if i not in second]
        results.append(_combined(e, line[kept], [of_pair.get(i, values[i]) for i in kept], shift))
    return results


def check_transform(op: Op, numbers: int) -> None:
    """The rows read of every channel's phases, and the transformed ones of every tile."""
    args, spec = op.args, op.spec
    width = spec.vectors * spec.target.lanes
    first = min(band.first for band in spec.bands) * spec.pitch
    last = max(band.first + band.taps for band in spec.bands) + spec.height - 2
    planes = (op.units * len(spec.bands) - 1) * spec.plane
    inside(op, "x", args["x"] + first, args["x"] + planes + last * spec.pitch + width, numbers)
    inside(op, "channels", 0, op.units, spec.channels)
    inside(op, "out", args["out"], args["out"] + (spec.tiles * spec.slots - 1) * spec.out_plane + width, numbers)


def check(op: Op, numbers: int) -> None:
    args, spec, tile = op.args, op.spec, op.spec.tile
    offsets = args["offsets"].astype(np.int64)
    starts = pointers(op, "starts", offsets.size)
    if starts.size != spec.points + 1 or args["weights"].size < op.units * spec.channels * starts[-1]:
        raise IndexError(f"{op.node!r}: weights, offsets and starts have sizes that do not belong together")
    span = (tile.row_tiles() - 1) * tile.pitch + tile.out.vectors * spec.target.lanes
    inside(op, "x", args["x"] + int(offsets.min()), args["x"] + int(offsets.max()) + span, numbers)
    inside(op, "rows", 0, tile.rows, tile.out.groups)
    check_stores(op, args["channels"], numbers)


#: Level 3 unrolls loops of few rounds: for these kernels that takes three times as long and gains nothing.
TRANSFORM = Kernel("transform", TRANSFORM_FIELDS, emit_transform, check_transform, level=2)
WINOGRAD = Kernel("winograd", FIELDS, emit, check, level=2, spreads=True, is_layer=True)
