"""What the convolutions share: which vectors a tile holds, where they lie, and how results are stored."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.runtime.kernels.activation import Chain, activate
from mirrormask.runtime.kernels.base import Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["Tile", "check_stores", "tile_span"]


@dataclass(frozen=True)
class Tile:
    """A register tile of output pixels: ``rows`` row vectors of ``vectors`` vectors each.

    Attributes:
        out: the layout of the output (``channels`` is of no account).
        pitch: floats from one input row vector to the next.
        activation: applied to every result.
        residual: whether a tensor of the output's layout is added before the activation.
    """

    rows: int
    vectors: int
    out: Layout
    pitch: int
    activation: Chain
    residual: bool

    @property
    def size(self) -> int:
        """Vectors in the tile."""
        return self.rows * self.vectors

    def inputs(self, lanes: int) -> list[int]:
        """The offset of each vector in the input, in floats from the tile's first."""
        return [r * self.pitch + v * lanes for r in range(self.rows) for v in range(self.vectors)]

    def outputs(self, lanes: int) -> list[int]:
        """The offset of each vector in the output."""
        return [r * self.out.pitch + v * lanes for r in range(self.rows) for v in range(self.vectors)]

    def row_tiles(self) -> int:
        """How many tiles cover the rows; the last one overlaps its neighbour rather than overrun the plane."""
        return -(-self.out.groups // self.rows)

    def column_tiles(self) -> int:
        """How many tiles cover a row; ``vectors`` divides it."""
        return self.out.vectors // self.vectors

    def each(self, e: Emitter, body: object) -> None:
        """Loop over the tiles: ``body(row, column)``, both run-time values, column in floats."""
        last = e.whole(self.out.groups - self.rows)

        def columns(row: Value) -> None:
            if self.column_tiles() == 1:
                body(row, e.whole(0))  # type: ignore[operator]
                return
            step = self.vectors * e.lanes
            e.loop(0, self.out.vectors * e.lanes, lambda column, _: body(row, column), step=step)  # type: ignore[operator]

        e.loop(0, self.row_tiles(), lambda t, _: columns(e.minimum(e.mul(t, self.rows), last)))

    def store(self, e: Emitter, values: list[Value], out: Value, row: Value, column: Value, residual: Value) -> None:
        """Add the residual, apply the activation, clear the padding and store; write the halo copies too."""
        layout = self.out
        offsets = self.outputs(e.lanes)
        for i, value in enumerate(values):
            if self.residual:
                value = e.fadd(value, e.load(e.at(residual, offsets[i]), aligned=True))
            value = self._clear(e, activate(e, self.activation, value), i, column)
            e.store(value, e.at(out, offsets[i]), aligned=True)
            if layout.segments > 1:
                self._store_halo(e, value, out, offsets[i], e.add(row, i // self.vectors))

    def _clear(self, e: Emitter, value: Value, i: int, column: Value) -> Value:
        layout, lanes = self.out, e.lanes
        if layout.segments > 1:
            # Rows past the last one (7 rows in 2 segments of 4) lie in the last segments; which lanes those are
            # depends on the row, but a tile of such a map always holds the whole map.
            rows = [i + segment * layout.groups for segment in range(layout.segments)]
            return e.keep(
                value, [row < layout.height and c < layout.width for row in rows for c in range(layout.stride)]
            )
        if layout.stride == layout.width:
            return value
        if self.column_tiles() == 1:
            first = i % self.vectors * lanes
            return e.keep(value, [first + c < layout.width for c in range(lanes)])
        return e.keep_below(value, e.add(column, i % self.vectors * lanes), layout.width)

    def _store_halo(self, e: Emitter, value: Value, out: Value, offset: int, row: Value) -> None:
        """With segments, the row above the first of segment ``p`` is the last of ``p - 1``: copy it, and conversely."""
        layout, lanes = self.out, e.lanes
        index, zero = offset // layout.pitch, e.zero()
        turn = layout.stride
        if index >= layout.groups - layout.halo:
            down = e.shuffle(zero, value, [lanes + c - turn if c >= turn else c for c in range(lanes)])
            e.store(down, e.at(out, offset - layout.groups * layout.pitch), aligned=True)
        if index < layout.halo:
            up = e.shuffle(value, zero, [c + turn for c in range(lanes)])
            e.store(up, e.at(out, offset + layout.groups * layout.pitch), aligned=True)


def tile_span(tile: Tile, pitch: int, lanes: int) -> int:
    """Numbers from the first to past the last that the tiles of one plane touch, rows being ``pitch`` apart."""
    return (tile.out.groups - 1) * pitch + tile.out.vectors * lanes


def check_stores(op: Op, channels: int, numbers: int) -> None:
    """What an op with a tile writes, adds and reads of its bias."""
    tile, lanes = op.spec.tile, op.spec.target.lanes
    halo = tile.out.origin if tile.out.segments > 1 else 0
    span = (channels - 1) * tile.out.plane + tile_span(tile, tile.out.pitch, lanes) + halo
    for name in ("out", "residual") if tile.residual else ("out",):
        inside(op, name, op.args[name] - halo, op.args[name] + span, numbers)
    inside(op, "bias", 0, channels, op.args["bias"].size)
