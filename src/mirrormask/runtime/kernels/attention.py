"""Scaled dot product attention, ``softmax(scale q k^T + mask) v`` for each head of each sequence.

Tokens are the columns of planes, in as many buffers as the sequence needs (see :mod:`kernels.facts`); a head is some
neighbouring planes. Vectors hold queries, so that everything that is summed over keys or features is a loop, and what
is made of a query lies in its lane. Keys come in blocks. Of each query there is the largest score so far, and sums of
``exp(score - largest)`` with and without the values, which shrink when a larger score comes: Milakov and Gimelshein
2018, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.activation import exponential
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import FLOAT, I32, Emitter, Value
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["ATTENTION", "FIELDS", "AttentionSpec", "emit"]

FIELDS = ("query", "key", "value", "out", "mask", "starts", "heads", "bias", "bias_row", "bias_head", "flag")
#: Keys of a block, keys whose scores are made together, and features of the result that are.
KEYS, TOGETHER = 64, 4


@dataclass(frozen=True)
class AttentionSpec:
    """What the code depends on.

    Attributes:
        layout: of one feature of all tokens of a buffer.
        width, value_width: features of a head of the query and of the value.
        scale: of the scores.
        causal: whether a token sees none after it.
        masked: whether there is a mask, a tensor outside: its number is ``mask``.
        keys: the layout of one feature of the keys and values; ``layout`` if there is none.
        rows: of maps, each of which is a sequence of its own, and there are no buffers; 0 for sequences in buffers.
        biased: whether a stored bias is added to the scores: ``[rows, heads, keys, queries]``.
    """

    target: Target
    layout: Layout
    width: int
    value_width: int
    scale: float
    causal: bool
    masked: bool
    keys: Layout | None = None
    rows: int = 0
    biased: bool = False

    @property
    def key_layout(self) -> Layout:
        """Of the keys and values."""
        return self.keys or self.layout


@dataclass
class Queries:
    """A vector of queries: the buffer that they are in, from which column on, how many are queries, and the first's
    place in its sequence."""  # fmt: skip

    arena: Value
    column: Value
    valid: Value
    place: Value


@dataclass
class Scratch:
    """Memory of a call: a block's scores, sums of values, and of each query the largest score and the sum of powers."""

    scores: Value
    sums: Value
    running: Value

    @classmethod
    def of(cls, e: Emitter, spec: AttentionSpec) -> Scratch:
        """Taken once: what is taken in a loop is taken again each time."""
        with e.floats():
            return cls(*(e.scratch(rows * e.lanes) for rows in (KEYS, spec.value_width, 2)))


class _Head:
    """One head of one sequence."""

    def __init__(self, e: Emitter, spec: AttentionSpec, scratch: Scratch, head: Value, sequence: Value) -> None:
        self.e, self.spec, self.head, self.sequence = e, spec, head, sequence
        starts, heads = e.constants("starts"), e.field("heads")
        self.first = [e.load_int(starts, e.add(e.mul(heads, i), head), I32) for i in range(3)]
        self.tokens = e.whole(spec.layout.width)
        if spec.rows:  # a row of a map, all of which lies in one place
            self.length, self.pitch = e.whole(spec.key_layout.width), e.whole(0)
        else:
            self.length, self.pitch = e.fact("length"), e.fact("pitch")
        self.begin = e.mul(sequence, self.length)
        self.scores, self.sums, self.running = scratch.scores, scratch.sums, scratch.running

    def plane(self, name: str, arena: Value, feature: Value, column: Value) -> Value:
        """Where a feature of the token in ``column`` of a buffer lies."""
        e, layout = self.e, self.spec.key_layout if name in ("key", "value") else self.spec.layout
        inner = e.add(e.add(e.mul(feature, layout.plane), column), layout.origin)
        return e.at(arena, e.add(e.field(name), inner))

    def each_buffer(self, layout: Layout, end: Value, body: Callable[[Value, Value, Value, Value], None]) -> None:
        """``body(arena, low, high, place)``: the columns of each buffer that hold the sequence's first ``end`` tokens,
        and the place in the sequence of the column 0."""  # fmt: skip
        e = self.e
        if self.spec.rows:
            start = e.mul(self.sequence, layout.pitch)
            body(e.arena, start, e.add(start, end), e.b.sub(e.whole(0), start))
            return
        last = e.add(self.begin, end)

        def at(number: Value, _: list[Value]) -> None:
            base = e.b.mul(number, self.tokens)
            low = e.maximum(e.b.sub(self.begin, base), e.whole(0))
            high = e.minimum(e.b.sub(last, base), self.tokens)
            body(e.at(e.arena, e.b.mul(number, self.pitch)), low, high, e.b.sub(base, self.begin))

        first = e.b.sdiv(self.begin, self.tokens)
        e.loop(first, e.b.sdiv(e.add(last, e.b.sub(self.tokens, e.whole(1))), self.tokens), at)

    def bias(self, queries: Queries, key: Value) -> Value:
        """What the mask adds to the scores of these queries with a key."""
        e = self.e
        mask, steps = e.external("mask"), [e.fact(f"mask {i}") for i in range(4)]
        sequence = e.add(e.fact("sequence"), self.sequence)
        place = e.add(e.b.mul(sequence, steps[0]), e.add(e.b.mul(self.head, steps[1]), e.b.mul(key, steps[3])))
        # Lanes past the last query read that one's.
        last = e.b.sub(self.length, e.whole(1))
        value = e.zero()
        for lane in range(e.lanes):
            query = e.minimum(e.add(queries.place, lane), last)
            value = e.insert(value, e.load_float(e.at(mask, e.add(place, e.b.mul(query, steps[2])))), lane)
        return value

    def stored_bias(self, queries: Queries, key: Value) -> Value:
        """What the stored bias adds to the scores of these queries with a key: whole vectors of queries."""
        e = self.e
        wide = -(-self.spec.layout.width // e.lanes) * e.lanes
        shift = e.add(e.b.mul(self.sequence, e.field("bias_row")), e.b.mul(self.head, e.field("bias_head")))
        return e.load(e.at(e.constants("bias"), e.add(shift, e.add(e.mul(key, wide), queries.place))))

    def score(self, queries: Queries, arena: Value, column: Value, base: Value, count: int) -> list[Value]:
        """The scores of the queries with ``count`` keys from a column on."""
        e, width = self.e, self.spec.width

        def at(d: Value, totals: list[Value]) -> list[Value]:
            feature = e.add(self.first[0], d)
            query = e.converted(e.load(self.plane("query", queries.arena, feature, queries.column)), FLOAT)
            row = self.plane("key", arena, e.add(self.first[1], d), column)
            found = []
            for i, total in enumerate(totals):
                key = e.converted(e.load_float(e.at(row, i)), FLOAT)
                with e.floats():
                    found.append(e.fma(query, e.splat(key), total))
            return found

        with e.floats():
            start = [e.zero()] * count
        totals = e.loop(0, width, at, start)
        with e.floats():
            found = []
            for i, total in enumerate(totals):
                key = e.add(e.add(column, base), i)
                total = e.fmul(total, e.splat(self.spec.scale))
                if self.spec.biased:
                    total = e.fadd(total, self.stored_bias(queries, key))
                if self.spec.masked:
                    total = e.fadd(total, self.bias(queries, key))
                if self.spec.causal:
                    places = e.ramp(queries.place, e.lanes)
                    seen = e.b.icmp_signed(">=", places, e.splat_int(e.b.trunc(key, I32)))
                    total = e.b.select(seen, total, e.splat(float("-inf")))
                found.append(total)
            return found

    def block(self, queries: Queries, arena: Value, low: Value, high: Value, base: Value, most: Value) -> list[Value]:
        """The scores of a block of keys go to the scratch; the largest so far."""
        e = self.e

        def some(count: int) -> Callable[[Value, list[Value]], list[Value]]:
            def at(column: Value, found: list[Value]) -> list[Value]:
                (largest,) = found
                scores = self.score(queries, arena, column, base, count)
                with e.floats():
                    for i, score in enumerate(scores):
                        e.store(score, e.at(self.scores, e.mul(e.add(e.b.sub(column, low), i), e.lanes)))
                        largest = e.larger(largest, score)
                return [largest]

            return at

        whole = e.add(low, e.b.and_(e.b.sub(high, low), e.whole(-TOGETHER)))
        found = e.loop(low, whole, some(TOGETHER), [most], step=TOGETHER)
        return e.loop(whole, high, some(1), found)

    def powers(self, count: Value, largest: Value, total: Value) -> Value:
        """Scores become ``exp(score - largest)``; their sum, with what was summed before."""
        e = self.e

        def at(i: Value, found: list[Value]) -> list[Value]:
            with e.floats():
                place = e.at(self.scores, e.mul(i, e.lanes))
                score = e.load(place)
                never = e.b.fcmp_ordered("==", score, e.splat(float("-inf")))
                power = e.b.select(never, e.zero(), exponential(e, e.b.fsub(score, largest)))
                e.store(power, place)
                return [e.fadd(found[0], power)]

        return e.loop(0, count, at, [total])[0]

    def add_values(self, arena: Value, low: Value, count: Value, shrink: Value) -> None:
        """Each sum of values shrinks, and the block's values are added."""
        e, width = self.e, self.spec.value_width

        def some(number: int) -> Callable[[Value, list[Value]], None]:
            def at(d: Value, _: list[Value]) -> None:
                with e.floats():
                    places = [e.at(self.sums, e.mul(e.add(d, i), e.lanes)) for i in range(number)]
                    start = [e.fmul(e.load(place), shrink) for place in places]
                rows = [self.plane("value", arena, e.add(e.add(self.first[2], d), i), low) for i in range(number)]

                def add(j: Value, totals: list[Value]) -> list[Value]:
                    with e.floats():
                        power = e.load(e.at(self.scores, e.mul(j, e.lanes)))
                    values = [e.converted(e.load_float(e.at(row, j)), FLOAT) for row in rows]
                    with e.floats():
                        return [e.fma(power, e.splat(v), t) for v, t in zip(values, totals, strict=True)]

                totals = e.loop(0, count, add, start)
                with e.floats():
                    for place, value in zip(places, totals, strict=True):
                        e.store(value, place)

            return at

        whole = width // TOGETHER * TOGETHER
        e.loop(0, whole, some(TOGETHER), step=TOGETHER)
        e.loop(whole, width, some(1))

    def attend(self, queries: Queries) -> None:
        """One vector of queries, all their keys."""
        e, width, running = self.e, self.spec.value_width, self.running
        with e.floats():
            nothing = e.splat(float("-inf"))
            e.store(nothing, running)
            e.store(e.zero(), e.at(running, e.lanes))
            e.loop(0, width, lambda d, _: e.store(e.zero(), e.at(self.sums, e.mul(d, e.lanes))))
        end = self.length
        if self.spec.causal:
            end = e.minimum(end, e.add(queries.place, e.lanes))

        def at_buffer(arena: Value, low: Value, high: Value, base: Value) -> None:
            def at_block(column: Value, _: list[Value]) -> None:
                stop = e.minimum(e.add(column, KEYS), high)
                count = e.b.sub(stop, column)
                with e.floats():
                    most, total = e.load(running), e.load(e.at(running, e.lanes))
                (largest,) = self.block(queries, arena, column, stop, base, most)
                with e.floats():
                    # Where no key is seen so far, any number does.
                    none = e.b.fcmp_ordered("==", largest, nothing)
                    level = e.b.select(none, e.zero(), largest)
                    shrink = exponential(e, e.b.fsub(most, level))
                    total = e.fmul(total, shrink)
                total = self.powers(count, level, total)
                self.add_values(arena, column, count, shrink)
                with e.floats():
                    e.store(largest, running)
                    e.store(total, e.at(running, e.lanes))

            e.loop(low, high, at_block, step=KEYS)

        self.each_buffer(self.spec.key_layout, end, at_buffer)
        with e.floats():
            total = e.load(e.at(running, e.lanes))
            unseen = e.b.fcmp_ordered("==", total, e.zero())
            share = e.b.select(unseen, e.zero(), e.fdiv(e.splat(1.0), total))

        def put(d: Value, _: list[Value]) -> None:
            with e.floats():
                value = e.fmul(e.load(e.at(self.sums, e.mul(d, e.lanes))), share)
            value = e.converted(value)
            e.watch(value)
            place = self.plane("out", queries.arena, e.add(e.mul(self.head, width), d), queries.column)
            if self.spec.rows:  # zeros to the end of the row's last vector
                places, end = e.ramp(e.whole(0), e.lanes), e.splat_int(e.b.trunc(queries.valid, I32))
                e.store(e.b.select(e.b.icmp_signed("<", places, end), value, e.zero()), place)
            else:
                e.store_below(value, place, queries.valid)

        e.loop(0, width, put)


def emit(spec: AttentionSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: heads, for all sequences of the buffers."""
    e = Emitter(spec.target, name, FIELDS)
    scratch = Scratch.of(e, spec)

    def at_head(head: Value, _: list[Value]) -> None:
        def at_sequence(sequence: Value, _: list[Value]) -> None:
            one = _Head(e, spec, scratch, head, sequence)

            def at_queries(arena: Value, low: Value, high: Value, base: Value) -> None:
                def at(column: Value, _: list[Value]) -> None:
                    one.attend(Queries(arena, column, e.b.sub(high, column), e.add(column, base)))

                e.loop(low, high, at, step=e.lanes)

            length = one.tokens if spec.rows else one.length
            one.each_buffer(spec.layout, length, at_queries)

        e.loop(0, spec.rows or e.fact("sequences"), at_sequence)
        if not spec.rows:
            _clear(e, spec, head)

    e.loop(e.low, e.high, at_head)
    return e.finish()


def _clear(e: Emitter, spec: AttentionSpec, head: Value) -> None:
    """Zeros in the columns that hold no token: what follows computes with them too."""
    used = e.b.mul(e.fact("sequences"), e.fact("length"))
    layout, tokens = spec.layout, e.whole(spec.layout.width)

    def at_buffer(number: Value, _: list[Value]) -> None:
        arena = e.at(e.arena, e.b.mul(number, e.fact("pitch")))
        low = e.maximum(e.b.sub(used, e.b.mul(number, tokens)), e.whole(0))

        def at_feature(d: Value, _: list[Value]) -> None:
            plane = e.add(e.mul(e.add(e.mul(head, spec.value_width), d), layout.plane), layout.origin)
            row = e.at(arena, e.add(e.field("out"), plane))
            e.loop(low, tokens, lambda c, _: e.store_below(e.zero(), e.at(row, c), e.b.sub(tokens, c)), step=e.lanes)

        e.loop(0, spec.value_width, at_feature)

    e.loop(0, e.fact("buffers"), at_buffer)


def check(op: Op, numbers: int) -> None:
    spec, starts = op.spec, op.args["starts"].reshape(3, -1)
    if starts.shape[1] != op.units or op.args["heads"] != op.units or int(starts.min(initial=0)) < 0:
        raise IndexError(f"{op.node!r}: {op.units} heads begin at {starts.tolist()}")
    if spec.rows and (spec.layout.segments > 1 or spec.key_layout.segments > 1):
        raise IndexError(f"{op.node!r}: rows that share vectors")
    widths = (spec.width, spec.width, spec.value_width)
    for name, first, width in zip(("query", "key", "value"), starts, widths, strict=True):
        layout = spec.layout if name == "query" else spec.key_layout
        # A vector of queries may begin at the last column.
        reach = layout.origin + max(0, spec.rows - 1) * layout.pitch + layout.width + spec.target.lanes
        end = (int(first.max(initial=0)) + width - 1) * layout.plane + reach
        inside(op, name, op.args[name], op.args[name] + end, numbers)
    if spec.biased:
        wide = -(-spec.layout.width // spec.target.lanes) * spec.target.lanes
        last = (spec.rows - 1) * op.args["bias_row"] + (op.units - 1) * op.args["bias_head"]
        inside(op, "bias", 0, last + spec.key_layout.width * wide, op.args["bias"].size)
    inside(op, "out", op.args["out"], op.args["out"] + op.units * spec.value_width * spec.layout.plane, numbers)


ATTENTION = Kernel("attention", FIELDS, emit, check, together=True)
