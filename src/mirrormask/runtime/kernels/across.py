"""Walking across the features of each row: sums and maxima over them, and what is then made of each.

Rows that are the columns of planes are taken a vector of rows at a time, one feature after the other. A single row is
one run of numbers, taken a vector of features at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Op, inside
from mirrormask.runtime.kernels.emit import FLOAT, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["Across", "RowsSpec", "check_rows", "each_vector"]

#: Features that are summed apart from each other: the sums need not wait for one another.
APART = 4

Change = Callable[[Value], Value]


@dataclass(frozen=True)
class RowsSpec:
    """What code over the features of rows depends on.

    Attributes:
        layout: of one feature of all rows; flat for a single row.
        features: how many there are.
        maps: whether a plane is a map: all of it is walked, and zeros stay where ``inside`` is zero.
    """

    target: Target
    layout: Layout
    features: int
    maps: bool


class Across:
    """One vector of rows, or the one row, as 32-bit floats."""

    def __init__(self, e: Emitter, spec: RowsSpec, x: Value, out: Value, kept: Value | None = None) -> None:
        self.kept = kept
        self.e, self.flat, self.features, self.x, self.out = e, spec.layout.flat, spec.features, x, out
        self.step = e.lanes if self.flat else 1
        self.pitch = 1 if self.flat else spec.layout.plane
        self.whole = spec.features // self.step * self.step

    def _at(self, place: Value, feature: Value) -> Value:
        return self.e.at(place, self.e.mul(feature, self.pitch))

    def _load(self, place: Value, feature: Value) -> Value:
        value = self.e.load(self._at(place, feature), aligned=not self.flat)
        return self.e.converted(value, FLOAT)

    def _joined(self, join: Callable[[Value, Value], Value], neutral: float, change: Change) -> Value:
        e = self.e
        with e.floats():
            start = e.splat(neutral)

        def several(feature: Value, found: list[Value]) -> list[Value]:
            places = [e.add(feature, i * self.step) for i in range(len(found))]
            return [join(one, change(self._load(self.x, place))) for one, place in zip(found, places, strict=True)]

        together = self.whole // (APART * self.step) * APART * self.step
        parts = e.loop(0, together, several, [start] * APART, step=APART * self.step)
        (value,) = e.loop(together, self.whole, several, [reduce(join, parts)], step=self.step)
        rest = self.features - self.whole
        if rest:
            last = e.converted(e.load_part(self._at(self.x, e.whole(self.whole)), rest), FLOAT)
            with e.floats():
                missing = e.values([0.0 if lane < rest else neutral for lane in range(e.lanes)])
            kept = e.keep(change(last), [lane < rest for lane in range(e.lanes)])
            value = join(value, e.fadd(kept, missing) if neutral else kept)
        if not self.flat:
            return value
        with e.floats():
            return e.splat(reduce(join, [e.extract(value, lane) for lane in range(e.lanes)]))

    def total(self, change: Change = lambda value: value) -> Value:
        """The sum of ``change(x)`` over the features, for each row in its lane (in every lane, for a single row)."""
        return self._joined(self.e.fadd, 0.0, change)

    def largest(self) -> Value:
        """The largest feature; NaN if one is."""
        return self._joined(self.e.larger, float("-inf"), lambda value: value)

    def write(self, change: Callable[[Value, Value], Value], *, again: bool = False) -> None:
        """``out = change(x, feature)``, or of what was written before if ``again``.

        ``feature`` is the number of the feature, of the first one in a vector for a single row.
        """
        e, source = self.e, self.out if again else self.x

        def at(feature: Value, _: list[Value]) -> None:
            value = e.converted(change(self._load(source, feature), feature))
            e.watch(value)
            value = value if self.kept is None else e.b.select(self.kept, value, e.zero())
            # A single row ends with a margin, into which its last vector may reach.
            e.store(value, self._at(self.out, feature), aligned=not self.flat)

        e.loop(0, self.features, at, step=self.step)

    def write_one(self, value: Value) -> None:
        """``out = value``, as the only feature; of a single row, whose value is in every lane, the first number."""
        e = self.e
        value = e.converted(value)
        e.watch(value)
        value = value if self.kept is None else e.b.select(self.kept, value, e.zero())
        # A single row ends with a margin, into which its last vector may reach.
        e.store(value, self.out, aligned=not self.flat)

    def number(self, constants: Value, feature: Value) -> Value:
        """The number of ``constants`` for a feature; of a single row, those for the features of a vector."""
        e = self.e
        with e.floats():
            place = e.at(constants, feature)
            return e.load(place) if self.flat else e.splat(e.load_float(place))


def each_vector(e: Emitter, spec: RowsSpec, body: Callable[[Across], None]) -> None:
    """``body`` for every vector of rows; they are the work units."""
    x, out, origin = e.buffer("x"), e.buffer("out"), 0 if spec.maps else spec.layout.origin

    def at_vector(number: Value, _: list[Value]) -> None:
        shift = e.add(e.mul(number, e.lanes), origin) if not spec.layout.flat else e.whole(0)
        kept = None
        if spec.maps:
            with e.floats():
                kept = e.b.fcmp_ordered("!=", e.load(e.at(e.constants("inside"), shift)), e.zero())
        body(Across(e, spec, e.at(x, shift), e.at(out, shift), kept))

    e.loop(e.low, e.high, at_vector)


def check_rows(op: Op, numbers: int, made: int | None = None) -> None:
    """What is read and written of ``x`` and ``out``, which has as many features if ``made`` is not said."""
    spec, lanes = op.spec, op.spec.target.lanes
    width = lanes if spec.layout.flat else op.units * lanes
    origin = 0 if spec.maps else spec.layout.origin
    if spec.maps:
        inside(op, "inside", 0, width, op.args["inside"].size)
    if not spec.layout.flat and origin + width > spec.layout.plane:
        raise IndexError(f"{op.node!r}: {op.units} vectors of rows do not fit a plane of {spec.layout.plane}")
    for name, features in (("x", spec.features), ("out", spec.features if made is None else made)):
        end = -(-features // lanes) * lanes if spec.layout.flat else (features - 1) * spec.layout.plane + width
        inside(op, name, op.args[name], op.args[name] + origin + end, numbers)
