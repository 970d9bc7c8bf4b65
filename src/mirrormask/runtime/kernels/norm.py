"""Norms over the features of each row: ``gain (x - mean) / sqrt(variance + eps) + shift``, or without the mean.

Or ``x / (mean + eps)``, a feature's share in the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.runtime.kernels.across import Across, RowsSpec, check_rows, each_vector
from mirrormask.runtime.kernels.base import Kernel, Op, inside
from mirrormask.runtime.kernels.emit import Emitter, Value

__all__ = ["FIELDS", "NORM", "NormSpec", "emit"]

FIELDS = ("x", "out", "gain", "shift", "inside", "flag")


@dataclass(frozen=True)
class NormSpec(RowsSpec):
    """What the code depends on besides.

    Attributes:
        kind: ``"layer"``, ``"rms"`` or ``"mean"``.
    """

    eps: float
    kind: str


def emit(spec: NormSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: vectors of rows.

    The squares are summed of what is left without the mean: their sum does not lose what it shares with the mean's.
    """
    e = Emitter(spec.target, name, FIELDS)
    gain, shift = e.constants("gain"), e.constants("shift")

    def at(rows: Across) -> None:
        with e.floats():
            share, eps = e.splat(1.0 / spec.features), e.splat(spec.eps)
        mean = e.fmul(rows.total(), share) if spec.kind != "rms" else None

        if spec.kind == "mean":
            assert mean is not None
            with e.floats():
                part = e.fdiv(e.splat(1.0), e.fadd(mean, eps))
            rows.write(lambda value, feature: e.fmul(value, part))
            return

        def centred(value: Value) -> Value:
            return value if mean is None else e.b.fsub(value, mean)

        def square(value: Value) -> Value:
            value = centred(value)
            return e.fmul(value, value)

        squares = rows.total(square)
        with e.floats():
            scale = e.fdiv(e.splat(1.0), e.root(e.fma(squares, share, eps)))

        def normalised(value: Value, feature: Value) -> Value:
            value = e.fmul(centred(value), scale)
            with e.floats():
                return e.fma(value, rows.number(gain, feature), rows.number(shift, feature))

        rows.write(normalised)

    each_vector(e, spec, at)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    check_rows(op, numbers)
    lanes = op.spec.target.lanes
    for name in ("gain", "shift"):
        needed = -(-op.spec.features // lanes) * lanes if op.spec.layout.flat else op.spec.features
        inside(op, name, 0, needed, op.args[name].size)


NORM = Kernel("norm", FIELDS, emit, check)
