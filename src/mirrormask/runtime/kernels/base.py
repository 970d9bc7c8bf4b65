"""What is known of a kernel, one call of one, and the bounds that each call is checked against when a plan is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Kernel", "Op", "check_op", "inside", "pointers"]


@dataclass(frozen=True)
class Kernel:
    """All that is known of one kind of generated code; a constant at the end of the file that emits it.

    Attributes:
        kind: its name, in reports and in the cache.
        fields: the names of its arguments, in order.
        emit: the LLVM IR for a specification, under a function name.
        check: an op's constants against each other, and what it reads and writes against an arena of so many numbers;
            raises ``IndexError``.
        level: LLVM's optimisation level.
        spreads: whether it may spread numbers that are not finite further than the weights do; it then notes them.
        is_layer: whether it computes a layer, rather than a step between layers.
        together: whether one call is for all buffers of some sequences of tokens, rather than for one of them.
    """

    kind: str
    fields: tuple[str, ...]
    emit: Callable[[Any, str], str]
    check: Callable[[Op, int], None]
    level: int = 3
    spreads: bool = False
    is_layer: bool = False
    together: bool = False


@dataclass
class Op:
    """One kernel call.

    Attributes:
        kernel, spec: which code.
        args: by field name: an integer, or an array of constants whose address is passed.
        units: how many work units there are.
        bounds: how the threads share them; even shares when empty.
        node: the node that this op computes (or prepares the input of).
    """

    kernel: Kernel
    spec: Any
    args: dict[str, Any]
    units: int
    node: str
    bounds: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """The kernel's name."""
        return self.kernel.kind

    @property
    def label(self) -> str:
        """The kernel as a report names it: with its tile and how many blocks of inputs it takes."""
        tile = getattr(self.spec, "tile", None)
        if tile is None:
            return self.kind.replace("vector_", "vector ")
        loads = "" if getattr(self.spec, "aligned", True) else " direct"
        blocks = self.args.get("blocks", getattr(self.spec, "channels", 1))
        return f"{self.kind}{loads} {tile.rows}x{tile.vectors}/{blocks}"

    @property
    def nbytes(self) -> int:
        """Bytes of constants."""
        return sum(v.nbytes for v in self.args.values() if isinstance(v, np.ndarray))


def check_op(op: Op, numbers: int) -> None:
    """Check every index that generated code will read, once when a plan is built: a wrong one would crash the process.

    Raises:
        IndexError: something lies outside of an arena of ``numbers``; the message names the layer and the array.
    """
    op.kernel.check(op, numbers)
    if list(op.bounds) != sorted(op.bounds) or (op.bounds and (op.bounds[0], op.bounds[-1]) != (0, op.units)):
        raise IndexError(f"{op.node!r}: the threads' shares {op.bounds} do not cover {op.units} units")


def inside(op: Op, what: str, low: int, high: int, end: int) -> None:
    """``[low, high)`` must lie in ``[0, end)``."""
    if low < 0 or high > end:
        raise IndexError(f"{op.node!r}: {what} spans [{low}, {high}), outside [0, {end})")


def pointers(op: Op, name: str, end: int) -> npt.NDArray[np.int64]:
    """An array that starts at 0, never falls, and ends at or before ``end``."""
    values: npt.NDArray[np.int64] = op.args[name].astype(np.int64)
    if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > end:
        raise IndexError(f"{op.node!r}: {name} does not rise from 0 to at most {end}")
    return values
