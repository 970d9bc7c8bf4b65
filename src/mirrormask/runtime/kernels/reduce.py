"""One number of all features of each row: their sum, mean, largest, or the root of the sum of their squares.

Of maps, over their channels, number by number: what spatial attention looks at.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.runtime.kernels.across import Across, RowsSpec, check_rows, each_vector
from mirrormask.runtime.kernels.base import Kernel, Op
from mirrormask.runtime.kernels.emit import Emitter

__all__ = ["FIELDS", "REDUCE", "ReduceSpec", "emit"]

FIELDS = ("x", "out", "inside", "flag")


@dataclass(frozen=True)
class ReduceSpec(RowsSpec):
    """What the code depends on besides.

    Attributes:
        kind: ``"sum"``, ``"mean"``, ``"max"`` or ``"norm"``.
    """

    kind: str


def emit(spec: ReduceSpec, name: str) -> str:
    """The kernel's LLVM IR. Work unit: vectors of rows, whose one number goes where a first feature would."""
    e = Emitter(spec.target, name, FIELDS)

    def at(rows: Across) -> None:
        if spec.kind == "max":
            value = rows.largest()
        elif spec.kind == "norm":
            value = rows.total(lambda value: e.fmul(value, value))
        else:
            value = rows.total()
        with e.floats():
            if spec.kind == "mean":
                value = e.fmul(value, e.splat(1.0 / spec.features))
            elif spec.kind == "norm":
                value = e.root(value)
        rows.write_one(value)

    each_vector(e, spec, at)
    return e.finish()


def check(op: Op, numbers: int) -> None:
    check_rows(op, numbers, made=1)


REDUCE = Kernel("reduce", FIELDS, emit, check)
