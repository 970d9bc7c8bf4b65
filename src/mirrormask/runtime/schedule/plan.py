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
from mirrormask.runtime.schedule.turns import Sequences, segments

__all__ = ["Plan", "Run", "State"]


@dataclass(frozen=True)
class State:
    """What stays in a plan's memory from one item to the next.

    Attributes:
        place: the number at which it begins.
        features, plane: how many there are, and the numbers from one to the next.
        rows: sequences, each of which has them.
    """

    place: int
    features: int
    plane: int
    rows: int


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
        state: of a plan whose items are moments of a recurrent layer.
        tokens: of a plan over sequences, the tokens that a buffer holds, and strides are those of one token; else 0.
    """

    ops: list[Op]
    floats: int
    strides: list[int]
    outputs: list[tuple[int, ...]]
    threads: int
    dtype: np.dtype[Any]
    panels: dict[str, Weight] = field(default_factory=dict)
    tokens: int = 0
    state: State | None = None
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
        self._segments = segments([op.kernel.together for op in self.ops])
        self._arenas = [aligned_array(self.floats, self.dtype)]
        self._keep_arenas: list[npt.NDArray[Any]] = []
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

    def set_state(self, values: npt.NDArray[Any] | None) -> None:
        """What is there before the first item: ``[rows, features]`` of as many rows as are wanted, zeros without."""
        assert self.state is not None
        end = self.state.place + self.state.features * self.state.plane
        planes = self.memory[self.state.place : end].reshape(self.state.features, self.state.plane)
        planes[:] = 0
        if values is not None:
            planes[:, : len(values)] = values.T

    def lower_flag(self) -> bool:
        """Whether :attr:`flag` was set; it no longer is. To be called under :attr:`lock`."""
        raised, self.flag[0] = bool(self.flag[0]), 0
        return raised

    @property
    def nbytes(self) -> int:
        """Bytes of the constants, the activations' memory and the table of calls; of code, which plans share, none."""
        arrays = [self._table, *self._keep, *self._arenas, *self._keep_arenas]
        constants = {id(v): v for op in self.ops for v in op.args.values() if isinstance(v, np.ndarray)}
        return sum(int(array.nbytes) for array in (*constants.values(), *arrays))

    def run(self, tensors: int, items: int, length: int = 0) -> None:
        """Run all items, see :meth:`prepare`."""
        with self.lock:
            self.prepare(tensors, items, None, length)()

    def prepare(self, tensors: int, items: int, steps: npt.NDArray[np.int64] | None = None, length: int = 0) -> Run:
        """A run of all items, to be started (under :attr:`lock`) any number of times.

        With enough items each thread takes some, in an arena of its own; else, if that pays, all threads share each.

        Args:
            tensors: the address of the addresses of the inputs and outputs.
            items: of a plan over sequences, how many there are.
            steps: of a plan over sequences, four for each tensor; see :data:`mirrormask.runtime.kernels.facts.STEPS`.
            length: tokens of each sequence.
        """
        if self.tokens:
            return self._prepare_sequences(tensors, Sequences(self.tokens, items, length), steps)
        threads, jobs = self.threads, []
        barrier = np.array([0, code.yield_address()], np.int64)
        if threads > 1 and items >= threads:
            self._make_arenas(threads, self.floats)
            cuts = [items * i // threads for i in range(threads + 1)]
            jobs = [self._words(tensors, cuts[i], cuts[i + 1], i, arena=i) for i in range(threads)]
        elif threads > 1 and self.shares and items:
            jobs = [self._words(tensors, 0, items, i, barrier=barrier.ctypes.data) for i in range(threads)]
        return Run(self._words(tensors, 0, items), jobs, barrier)

    def _make_arenas(self, count: int, floats: int) -> None:
        """At least so many, of at least so many numbers. Those of runs that were prepared stay."""
        for i in range(count):
            if i == len(self._arenas):
                self._arenas.append(aligned_array(floats, self.dtype))
            elif self._arenas[i].size < floats:
                self._keep_arenas.append(self._arenas[i])  # twice the size: few are left behind
                self._arenas[i] = aligned_array(max(floats, 2 * self._arenas[i].size), self.dtype)

    def _prepare_sequences(self, tensors: int, given: Sequences, steps: npt.NDArray[np.int64] | None) -> Run:
        """As :meth:`prepare`: groups of sequences take the place of items."""
        if steps is None:
            steps = np.zeros((len(self.strides), 4), np.int64)
        barrier = np.array([0, code.yield_address()], np.int64)
        apart = self.threads > 1 and given.groups >= self.threads
        shared = self.threads > 1 and not apart and self.shares and given.groups > 0
        self._make_arenas(self.threads if apart else 1, given.buffers * self.floats)
        facts = given.facts(self.floats, steps.ctypes.data)

        def turns(low: int, high: int, thread: int, arena: int, wait: int) -> npt.NDArray[np.int64]:
            common = self._words(tensors, 0, 0, thread, barrier=wait)[1:]
            base = self._arenas[arena].ctypes.data
            return given.turns(common, (low, high), self._segments, (base, self.floats * self.dtype.itemsize), facts)

        jobs: list[npt.NDArray[np.int64]] = []
        if apart:
            cuts = [given.groups * i // self.threads for i in range(self.threads + 1)]
            jobs = [turns(cuts[i], cuts[i + 1], i, i, 0) for i in range(self.threads)]
        elif shared:
            jobs = [turns(0, given.groups, i, 0, barrier.ctypes.data) for i in range(self.threads)]
        return Run(turns(0, given.groups, 0, 0, 0), jobs, barrier, (facts, steps))

    def _words(
        self, tensors: int, first: int, end: int, thread: int = 0, *, arena: int = 0, barrier: int = 0
    ) -> npt.NDArray[np.int64]:
        """What the native function reads, for the items from ``first`` to ``end``."""
        table, strides = self._table.ctypes.data, self._stride_words.ctypes.data
        place, count = self._arenas[arena].ctypes.data, len(self.strides)
        io = (table, len(self.ops), place, tensors, strides, count)
        words = [*io, first, end, thread, self.threads, barrier, op_words(self.threads), 0]
        return np.array([1, *words], np.int64)

    def run_op(self, index: int, tensors: int, repeats: int = 1) -> None:
        """Run a single op on the first item, ``repeats`` times, on whatever the arena holds: for measuring."""
        words = self._words(tensors, 0, repeats)
        if self.tokens:  # one sequence that fills a buffer
            given = Sequences(self.tokens, 1, self.tokens)
            facts = given.facts(self.floats, np.zeros((len(self.strides), 4), np.int64).ctypes.data)
            words[13] = facts.ctypes.data
        words[1] += 8 * op_words(self.threads) * index
        words[2] = 1
        words[5] = self._still.ctypes.data
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
        self,
        alone: npt.NDArray[np.int64],
        jobs: list[npt.NDArray[np.int64]],
        barrier: npt.NDArray[np.int64],
        keep: object = None,
    ) -> None:
        self._alone, self._jobs, self._barrier, self._facts = alone, jobs, barrier, keep
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
