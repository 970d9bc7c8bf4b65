"""Numbers of maps in other places, and stored numbers: windows, tokens put together or taken, rolled and padded maps.

out[c, to]  =  x[first[c] + from]        for every run of neighbouring places; zeros where ``from`` is negative
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import I32, Emitter, Value

__all__ = ["FIELDS", "PLACE", "PlaceSpec", "emit"]

FIELDS = ("x", "out", "numbers", "first", "sources", "places", "lengths", "runs", "pitch", "flag")


@dataclass(frozen=True)
class PlaceSpec:
    """What the code depends on.

    Attributes:
        stored: whether the numbers are constants, rather than in the arena.
    """

    target: Target
    stored: bool


def emit(spec: PlaceSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: channels of the result."""
    e = Emitter(spec.target, name, FIELDS)
    x = e.constants("numbers") if spec.stored else e.buffer("x")
    first, sources, places, lengths = (e.constants(n) for n in ("first", "sources", "places", "lengths"))

    def at_channel(channel: Value, _: list[Value]) -> None:
        plane = e.at(x, e.load_int(first, channel, I32))
        result = e.at(e.buffer("out"), e.mul(channel, e.field("pitch")))

        def at_run(number: Value, _: list[Value]) -> None:
            source = e.b.sub(e.load_int(sources, number, I32), e.whole(1))
            length, to = e.load_int(lengths, number, I32), e.at(result, e.load_int(places, number, I32))
            whole = e.b.and_(length, e.whole(-e.lanes))

            def copy() -> list[Value]:
                start = e.at(plane, source)
                e.loop(0, whole, lambda i, _: e.store(e.load(e.at(start, i)), e.at(to, i)), step=e.lanes)
                return e.loop(whole, length, lambda i, _: e.store_float(e.load_float(e.at(start, i)), e.at(to, i)))

            def clear() -> list[Value]:
                nothing = e.real(0.0)
                return e.loop(0, length, lambda i, _: e.store_float(nothing, e.at(to, i)))

            there = e.b.icmp_signed(">=", source, e.whole(0))
            e.either(there, copy, clear)

        e.loop(0, e.field("runs"), at_run)

    e.loop(e.low, e.high, at_channel)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    args, runs = op.args, op.args["runs"]
    first = args["first"].astype(np.int64)
    sources, places, lengths = (args[name][:runs].astype(np.int64) for name in ("sources", "places", "lengths"))
    if first.size != op.units or min(sources.size, places.size, lengths.size) < runs or not runs:
        raise IndexError(f"{op.node!r}: {op.units} channels and {runs} runs, of which not all are told")
    read = sources > 0
    low, high = (int(first.min()), int(first.max())) if op.units else (0, 0)
    end = int((sources + lengths - 1)[read].max(initial=0))
    room = args["numbers"].size if op.spec.stored else numbers
    start = 0 if op.spec.stored else args["x"]
    inside(op, "x", start + low, start + high + end, room)
    out_end = (op.units - 1) * args["pitch"] + int((places + lengths).max())
    inside(op, "out", args["out"] + int(places.min()), args["out"] + out_end, numbers)


PLACE = Kernel("place", FIELDS, emit, check)
