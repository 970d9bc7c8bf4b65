"""Softmax over the features of each row, and its logarithm."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.runtime.kernels.across import Across, RowsSpec, check_rows, each_vector
from mirrormask.runtime.kernels.activation import exponential, logarithm
from mirrormask.runtime.kernels.base import Kernel
from mirrormask.runtime.kernels.emit import Emitter, Value

__all__ = ["FIELDS", "SOFTMAX", "SoftmaxSpec", "emit"]

FIELDS = ("x", "out", "inside", "flag")


@dataclass(frozen=True)
class SoftmaxSpec(RowsSpec):
    """What the code depends on besides.

    Attributes:
        log: whether the logarithm is wanted: ``x - max - log sum exp(x - max)``.
    """

    log: bool


def emit(spec: SoftmaxSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: vectors of rows. ``exp(x - max) / sum exp(x - max)``, in 32 bits."""
    e = Emitter(spec.target, name, FIELDS)

    def at(rows: Across) -> None:
        most = rows.largest()

        def power(value: Value, feature: Value | None = None) -> Value:
            with e.floats():
                return exponential(e, e.b.fsub(value, most))

        total = rows.total(power)
        with e.floats():
            last = e.fadd(most, logarithm(e, total)) if spec.log else e.fdiv(e.splat(1.0), total)
        if spec.log:
            rows.write(lambda value, _: e.b.fsub(value, last))
        else:
            rows.write(lambda value, _: e.fmul(power(value), last))

    each_vector(e, spec, at)
    return e.finish()


SOFTMAX = Kernel("softmax", FIELDS, emit, check_rows)
