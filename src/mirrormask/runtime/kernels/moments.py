"""One moment of a recurrent layer: the state before becomes the state after, in place.

    LSTM   c = sigmoid(f) c + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c)       of sums pre + past, gates i, f, g, o
    GRU    n = tanh(pre_n + sigmoid(r) past_n),  h = n + sigmoid(z) (h - n)     gates r, z, n
    RNN    h = tanh(pre + past), or relu

Items of a plan are moments: its memory stays from one to the next, and so does the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels.activation import ACTIVATIONS
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value

__all__ = ["MOMENT", "MomentSpec"]

FIELDS = ("pre", "past", "state", "width", "flag")


@dataclass(frozen=True)
class MomentSpec:
    """What the code depends on.

    Attributes:
        layer: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        ragged: whether a gate ends within a vector.
    """

    target: Target
    layer: str
    ragged: bool


Pairs = list[tuple[Value, Value]]


def _lstm(e: Emitter, gates: Pairs, states: list[Value]) -> list[Value]:
    sigmoid, tanh = ACTIVATIONS["sigmoid"], ACTIVATIONS["tanh"]
    i, f, g, o = (e.fadd(pre, past) for pre, past in gates)
    cells = e.fma(sigmoid(e, f), states[1], e.fmul(sigmoid(e, i), tanh(e, g)))
    return [e.fmul(sigmoid(e, o), tanh(e, cells)), cells]


def _gru(e: Emitter, gates: Pairs, states: list[Value]) -> list[Value]:
    sigmoid = ACTIVATIONS["sigmoid"]
    r, z = (sigmoid(e, e.fadd(pre, past)) for pre, past in gates[:2])
    pre, past = gates[2]
    new = ACTIVATIONS["tanh"](e, e.fma(r, past, pre))
    return [e.fma(z, e.b.fsub(states[0], new), new)]


def _plain(activation: str) -> Callable[[Emitter, Pairs, list[Value]], list[Value]]:
    return lambda e, gates, states: [ACTIVATIONS[activation](e, e.fadd(*gates[0]))]


#: Layer -> gates, states, and the step.
STEPS: dict[str, tuple[int, int, Callable[[Emitter, Pairs, list[Value]], list[Value]]]] = {
    "lstm": (4, 2, _lstm),
    "gru": (3, 1, _gru),
    "rnn_tanh": (1, 1, _plain("tanh")),
    "rnn_relu": (1, 1, _plain("relu")),
}


def emit(spec: MomentSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: vectors of a gate."""
    e = Emitter(spec.target, name, FIELDS)
    pre, past, state = (e.buffer(n) for n in FIELDS[:3])
    width = e.field("width")
    gates, states, step = STEPS[spec.layer]

    def at_vector(i: Value, _: list[Value]) -> None:
        first = e.mul(i, e.lanes)

        def place(source: Value, number: int) -> Value:
            return e.at(source, e.add(first, e.mul(width, number)))

        pairs = [(e.load(place(pre, gate)), e.load(place(past, gate))) for gate in range(gates)]
        before = [e.load(place(state, number)) for number in range(states)]
        for number, value in enumerate(step(e, pairs, before)):
            if spec.ragged:  # what is past the hidden state are cells
                e.store_below(value, place(state, number), e.b.sub(width, first))
            else:
                e.store(value, place(state, number))

    e.loop(e.low, e.high, at_vector)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    gates, states, _ = STEPS[op.spec.layer]
    width, lanes = op.args["width"], op.spec.target.lanes
    end = op.units * lanes
    if end - width >= lanes or (end != width) != op.spec.ragged:
        raise IndexError(f"{op.node!r}: {op.units} vectors are not {width} numbers")
    for name, count in (("pre", gates), ("past", gates), ("state", states)):
        inside(op, name, op.args[name], op.args[name] + (count - 1) * width + end, numbers)


MOMENT = Kernel("moment", FIELDS, emit, check)
