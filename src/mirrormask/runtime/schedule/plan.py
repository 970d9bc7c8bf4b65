"""A plan: the ops of a region, their constants and their memory, run by one native call."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.machine.openmp import openmp
from mirrormask.machine.workers import run_together
from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.kernels import code
from mirrormask.runtime.kernels.base import Op, check_op
from mirrormask.runtime.kernels.driver import MAX_TENSORS, op_words
from mirrormask.runtime.schedule.memory import aligned_array

__all__ = ["Plan", "Run"]


@dataclass
class Plan:
    """The ops of a region for one item shape and thread count.

    Attributes:
        ops: in order.
        floats: the size of an arena, in numbers of ``dtype``.
        strides: floats from one item to the next, per external tensor (inputs, then outputs).
        outputs: shape per item of each output.
        threads: for which the work is shared out.
        dtype: of the arena's numbers.
        panels: dense weights by node, in the form that the plan reads: whoever holds the graph need not keep another.
    """

    ops: list[Op]
    floats: int
    strides: list[int]
    outputs: list[tuple[int, ...]]
    threads: int
    dtype: np.dtype[Any]
    panels: dict[str, Weight] = field(default_factory=dict)
    _keep: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.strides) > MAX_TENSORS:
            raise ValueError(f"the region has {len(self.strides)} inputs and outputs; a plan takes {MAX_TENSORS}")
        self.flag = np.zeros(1, np.int64)
        """Set by kernels that met a result that is not finite: watched ones, and those that spread it."""
        table = np.zeros((max(1, len(self.ops)), op_words(self.threads)), np.int64)
        for row, op in zip(table, self.ops, strict=False):
            check_op(op, self.floats)
            op.args["flag"] = self.flag
            words, args = _packed(op, self.threads)
            row[:] = words
            self._keep.append(args)
        self._table = table
        self._stride_words = np.array(self.strides, np.int64)
        self._still = np.zeros(len(self.strides) + 1, np.int64)
        self._arenas = [aligned_array(self.floats, self.dtype)]
        self.lock = threading.Lock()
        """Held while the plan runs: its memory serves one call at a time."""
        self.shares = self.threads > 1
        """Whether threads share single items; measured by whoever makes the plan."""

    @property
    def memory(self) -> npt.NDArray[Any]:
        """The numbers of the arena that a single thread uses."""
        return self._arenas[0]

    @property
    def spreads(self) -> bool:
        """Whether some kernel may spread numbers that are not finite further than the weights do, and then notes it."""
        return any(op.kernel.spreads for op in self.ops)

    def lower_flag(self) -> bool:
        """Whether :attr:`flag` was set; it no longer is. To be called under :attr:`lock`."""
        raised, self.flag[0] = bool(self.flag[0]), 0
        return raised

    @property
    def nbytes(self) -> int:
        """Bytes of the constants, the activations' memory and the table of calls; of code, which plans share, none."""
        arrays = [self._table, *self._keep, *self._arenas]
        return sum(op.nbytes for op in self.ops) + sum(int(array.nbytes) for array in arrays)

    def run(self, tensors: int, items: int) -> None:
        """Run all items, see :meth:`prepare`."""
        with self.lock:
            self.prepare(tensors, items)()

    def prepare(self, tensors: int, items: int) -> Run:
        """A run of all items, to be started (under :attr:`lock`) any number of times.

        With enough items each thread takes some, in an arena of its own; else, if that pays, all threads share each.

        Args:
            tensors: the address of the addresses of the inputs and outputs.
        """
        threads, jobs = self.threads, []
        barrier = np.array([0, code.yield_address()], np.int64)
        if threads > 1 and items >= threads:
            while len(self._arenas) < threads:
                self._arenas.append(aligned_array(self.floats, self.dtype))
            cuts = [items * i // threads for i in range(threads + 1)]
            jobs = [self._words(tensors, cuts[i], cuts[i + 1], i, arena=i) for i in range(threads)]
        elif threads > 1 and self.shares and items:
            jobs = [self._words(tensors, 0, items, i, barrier=barrier.ctypes.data) for i in range(threads)]
        return Run(self._words(tensors, 0, items), jobs, barrier)

    def _words(
        self, tensors: int, first: int, end: int, thread: int = 0, *, arena: int = 0, barrier: int = 0
    ) -> npt.NDArray[np.int64]:
        """What the native function reads, for the items from ``first`` to ``end``."""
        table, strides = self._table.ctypes.data, self._stride_words.ctypes.data
        place, count = self._arenas[arena].ctypes.data, len(self.strides)
        io = (table, len(self.ops), place, tensors, strides, count)
        return np.array([*io, first, end, thread, self.threads, barrier, op_words(self.threads)], np.int64)

    def run_op(self, index: int, tensors: int, repeats: int = 1) -> None:
        """Run a single op on the first item, ``repeats`` times, on whatever the arena holds: for measuring."""
        words = self._words(tensors, 0, repeats)
        words[0] += 8 * op_words(self.threads) * index
        words[1] = 1
        words[4] = self._still.ctypes.data
        code.run_functions()[0](words.ctypes.data)


def _packed(op: Op, threads: int) -> tuple[list[int], npt.NDArray[np.int64]]:
    """The words of the op table, and the argument array that they point to."""
    values = []
    for name in op.kernel.fields:
        value = op.args.get(name, 0)
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous:
                raise ValueError(f"the constant {name!r} of {op.node!r} is not contiguous")
            value = value.ctypes.data
        values.append(int(value))
    args = np.array(values or [0], np.int64)
    bounds = list(op.bounds) or [op.units * i // threads for i in range(threads + 1)]
    return [code.address_of(op.kernel, op.spec), args.ctypes.data, *bounds], args


class Run:
    """All that a run of a plan reads, in place.

    Attributes:
        function, words: the native function that does it all, and the address that it takes; None where threads of our
            own do it.
    """

    def __init__(
        self, alone: npt.NDArray[np.int64], jobs: list[npt.NDArray[np.int64]], barrier: npt.NDArray[np.int64]
    ) -> None:
        self._alone, self._jobs, self._barrier = alone, jobs, barrier
        one, team = code.run_functions()
        threads = openmp()
        self.function: Any = one
        self.words = alone.ctypes.data
        if jobs and threads is not None:
            addresses = [array.ctypes.data for array in (barrier, alone, *jobs)]
            self._task = np.array([threads.entries, len(jobs), *addresses], np.int64)
            self.function, self.words = team, self._task.ctypes.data
        elif jobs:
            self.function = None

    def __call__(self) -> None:
        """Run once, and wait for all threads."""
        if self.function is not None:
            self.function(self.words)
            return
        one, _ = code.run_functions()
        self._barrier[0] = 0
        if not run_together([partial(one, job.ctypes.data) for job in self._jobs]):
            one(self.words)
