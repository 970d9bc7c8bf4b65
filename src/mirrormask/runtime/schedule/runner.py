"""A graph at work on addresses: plans by input shape and number of threads, and the call that runs one.

This is what runs, whoever holds the tensors: :mod:`mirrormask.runtime.model.region` gives it those of torch,
:mod:`mirrormask.runtime.bundle` arrays of NumPy.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from mirrormask.machine.targets import Target, available_targets, best_target, fp16_target
from mirrormask.machine.timing import in_turns
from mirrormask.runtime.graph.ir import Graph, Unfit
from mirrormask.runtime.kernels.driver import MAX_THREADS
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Choice, Problem
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["MOST_SHAPES", "Call", "Runner", "resized"]

Shape = tuple[int, ...]

#: Vectors of rows that one item of a plan over rows holds at most, and rows: more do not stay in the L2 cache between
#: wide layers.
MOST_VECTORS, MOST_TOKENS = 8, 128
#: Seconds that threads must save by sharing an item. Here they are awake when this is measured; between calls that lie
#: some milliseconds apart they fall asleep, and take longer to wake than a small model takes.
LEAST_GAIN = 5e-5
#: Products from which on threads take rows of their own: about twice :data:`LEAST_GAIN` on one thread.
LEAST_WORK = 4e6
#: Input shapes whose calls are kept prepared, and shapes per item whose plans are kept; the oldest go.
MOST_CALLS, MOST_SHAPES = 64, 32


class Runner:
    """Runs a graph with generated kernels, on memory that its caller owns.

    Plans are made when first needed: for a region over images one per thread count (any batch size), for one over
    rows one for single rows and one per number of rows up to :attr:`most_tokens`. Any number of threads may call it.

    Attributes:
        graph, target, tuner: what it runs, on which instruction set, and who chooses the kernels.
        exact: (threads, tokens) of which plans exist, or existed where the graph was saved, for just so many rows.
    """

    def __init__(self, graph: Graph, target: Target, tuner: Tuner) -> None:
        self.graph, self.target, self.tuner = graph, target, tuner
        self.exact: set[tuple[int, int]] = set()
        self._plans: dict[tuple[int, int], Plan] = {}
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._direct: list[Runner] = []
        self._sized: dict[tuple[Shape, ...], Runner] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold addresses of this process; they are made anew where the runner goes.
        state = {**self.__dict__, "exact": set(), "_plans": {}, "_calls": {}, "_direct": [], "_sized": {}}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        runs = fp16_target() is not None if self.target.half else self.target in available_targets()
        if not runs:
            self.target, self.tuner = best_target(), Tuner("", measure=self.tuner.measure, around=self.tuner.around)

    # -- what fits ----------------------------------------------------------------------------------------------------

    def call_for(self, shapes: Sequence[Shape], threads: int) -> Call:
        """The call for inputs of these shapes, prepared once; see :meth:`known_call`.

        Raises:
            ValueError: they do not fit the graph or each other.
        """
        key = (*shapes, threads)
        call = self._calls.get(key)
        if call is not None:
            return call
        with self._lock:
            found = self.per_item(shapes)
            runner = self if found == self.wanted else self.sized(found)
            call = Call(runner, shapes, threads)
            calls = dict(self._calls)  # others may be looking into the old one
            calls[key] = call
            while len(calls) > MOST_CALLS:
                calls.pop(next(iter(calls)))
            self._calls = calls
            return call

    def known_call(self, shapes: Sequence[Shape], threads: int) -> Call | None:
        """The call for inputs of these shapes, if there was one lately."""
        return self._calls.get((*shapes, threads))

    @property
    def wanted(self) -> tuple[Shape, ...]:
        """The shapes per item that the graph was made for."""
        return tuple(self.graph.shapes[name] for name in self.graph.inputs)

    def per_item(self, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """What inputs of ``shapes`` are per item.

        Raises:
            ValueError: there are more or fewer than the graph takes.
            Unfit: they do not fit each other.
        """
        graph = self.graph
        if len(shapes) != len(graph.inputs):
            raise ValueError(f"the region takes {len(graph.inputs)} tensors, not {len(shapes)}")
        if graph.flattens:
            found: list[Shape] = [(math.prod(shape[1:]),) for shape in shapes]
        else:
            found = [tuple(shape[-1:] if graph.rows else shape[1:]) for shape in shapes]
        streams = len(shapes) - len(graph.masks)
        leading = {graph.leading(shape) for shape in shapes[:streams]}
        if graph.sequences:
            found[streams:] = [()] * len(graph.masks)
            _check_sequences(graph, leading, [tuple(shape) for shape in shapes[streams:]])
        if len(leading) > 1:
            raise Unfit(f"the inputs have shapes {[tuple(shape) for shape in shapes]}; they must have equal batches")
        return tuple(found)

    def sized(self, shapes: tuple[Shape, ...]) -> Runner:
        """One of the same graph for inputs of other shapes per item.

        Raises:
            Unfit: an operation does not fit them; its message names it.
        """
        with self._lock:
            if shapes not in self._sized:
                self._sized[shapes] = Runner(resized(self.graph, shapes), self.target, self.tuner)
                while len(self._sized) > MOST_SHAPES:
                    self._sized.pop(next(iter(self._sized)))
            return self._sized[shapes]

    # -- plans --------------------------------------------------------------------------------------------------------

    def plan_for(self, threads: int, items: int, length: int = 0) -> Plan:
        """The plan for a call with so many images or rows; of a graph over sequences, with rows of so many each."""
        with self._lock:
            key = (min(threads, MAX_THREADS), self.tokens(threads, items, length))
            if key not in self._plans:
                plan = lower(self.graph, self.target, key[0], self._choose, key[1])
                question = f"a team may share {key} {self.graph.shapes}"
                plan.shares = plan.threads > 1 and self.tuner.decide(question, lambda: _sharing_pays(plan))
                self._plans[key] = plan
                self.exact.add(key)
                # Dense weights are kept once, as the plan reads them.
                self.graph = self.graph.holding(plan.panels)
                self.tuner.save()
            return self._plans[key]

    def _choose(self, problem: Problem) -> Choice:
        return self.tuner(problem)

    def direct(self) -> Runner:
        """The runner for inputs with numbers that are not finite, which some kernels spread."""
        with self._lock:
            if not self._direct:
                self._direct.append(_Direct(self.graph, self.target, self.tuner))
            return self._direct[0]

    def plans(self) -> list[Plan]:
        """The plans made so far."""
        return list(self._plans.values())

    def tokens(self, threads: int, rows: int, length: int = 0) -> int:
        """Rows per item of the plan for a call with so many rows: all, or as many as make an item for each thread.

        Of sequences (of ``length``) an item takes whole ones, or of a long one as much as makes equal parts.

        Threads with rows of their own need not wait for each other after every layer; see :data:`LEAST_WORK`.
        """
        sequences = self.graph.sequences
        if not self.graph.rows or (rows == 1 and not sequences):
            return 1
        lanes, threads = self.target.lanes, min(threads, MAX_THREADS)
        if sequences and length:
            batch = rows // length
            if batch >= threads and rows * self.graph.products >= LEAST_WORK:
                batch = -(-batch // threads)
            if length > self.most_tokens:
                rows = -(-length // -(-length // self.most_tokens))
            else:
                rows = length * min(batch, self.most_tokens // length)
        elif rows >= threads * lanes and rows * self.graph.products >= LEAST_WORK:
            rows = -(-rows // threads)
        if rows < lanes:
            return max(lanes, 2)
        exact = min(self.most_tokens, -(-rows // lanes) * lanes)
        if not self.exact or (threads, exact) in self.exact:
            return exact
        # Numbers of rows that come later share few plans, however many there are.
        return min(self.most_tokens, lanes << (-(-rows // lanes) - 1).bit_length())

    @property
    def most_tokens(self) -> int:
        """Rows that one item of a plan over rows holds at most, a multiple of the vector width."""
        return min(MOST_TOKENS, MOST_VECTORS * self.target.lanes)

    @property
    def nbytes(self) -> int:
        """Memory of the plans made so far, and of the weights that they do not share."""
        constants = [value for plan in self._plans.values() for op in plan.ops for value in op.args.values()]
        kept = [node.weight for node in self.graph.layers() if node.weight is not None]
        weights = sum(w.nbytes for w in kept if not any(w.values is value for value in constants))
        plans = [plan for runner in (self, *self._direct) for plan in runner.plans()]
        return weights + sum(plan.nbytes for plan in plans)


class _Direct(Runner):
    """Its kernels compute every output from the inputs that its weights name, and no others."""

    def _choose(self, problem: Problem) -> Choice:
        return problem.direct(self.tuner(problem))


class Call:
    """A runner's call for one set of input shapes and a thread count, with all that can be known before it.

    Attributes:
        items: images or rows, and ``padded``: of which the caller's memory has room for.
        streams: inputs that are no masks; they come first.
        inner, outer: the shape of each result as the plan writes it, and as the caller wants it.
        simple: whether one native function, an input and an output are all of it.
    """

    def __init__(self, runner: Runner, shapes: Sequence[Shape], threads: int) -> None:
        leading = runner.graph.leading(shapes[0])
        self.runner, self.shapes, self.threads = runner, tuple(shapes), threads
        self.items = math.prod(leading)
        sequences = runner.graph.sequences
        length = leading[-1] if sequences else 0
        tokens = runner.tokens(threads, self.items, length)
        self.plan = runner.plan_for(threads, self.items, length)
        self.spreads = self.plan.spreads
        self.padded = self.items if sequences else -(-self.items // tokens) * tokens
        self.streams = len(shapes) - len(runner.graph.masks)
        self.inner: list[Shape] = [(self.padded, *out) for out in self.plan.outputs]
        self.outer: list[Shape] = [(*leading, *out) for out in self.plan.outputs]
        self._steps = np.zeros((len(self.plan.strides), 4), np.int64)
        self.addresses = (ctypes.c_int64 * len(self.plan.strides))()
        place = ctypes.addressof(self.addresses)
        if sequences:
            self.start = self.plan.prepare(place, self.items // max(1, length), self._steps, length)
        else:
            self.start = self.plan.prepare(place, self.padded // tokens)
        self.simple = self.start.function is not None and self.inner == self.outer and len(self.plan.strides) == 2

    def run(self, addresses: Sequence[int], strides: Sequence[Sequence[int]] = ()) -> bool:
        """Run once.

        Args:
            addresses: of contiguous float32 numbers: :attr:`padded` items of each input that is no mask, the masks,
                and room for each result of the shape :attr:`inner`.
            strides: of each mask, in numbers.

        Returns:
            Whether the results are to be computed again by :meth:`directly`, for numbers that are not finite.
        """
        with self.plan.lock:
            for i, address in enumerate(addresses):
                self.addresses[i] = address
            for i, (steps, shape) in enumerate(zip(strides, self.shapes[self.streams :], strict=True), self.streams):
                self._steps[i] = [0 if size == 1 else step for size, step in zip(shape, steps, strict=True)]
            self.start()
            return self.spreads and self.plan.lower_flag()

    def directly(self) -> Call:
        """The same call by kernels that spread nothing."""
        return self.runner.direct().call_for(self.shapes, self.threads)


def resized(graph: Graph, shapes: tuple[Shape, ...]) -> Graph:
    """The graph for inputs of other shapes per item.

    Raises:
        Unfit: an operation does not fit them; its message names it.
    """
    if graph.rows:
        raise Unfit(f"it takes rows of {[graph.shapes[name] for name in graph.inputs]}, not {list(shapes)}")
    return graph.resized(list(shapes))


def _sharing_pays(plan: Plan) -> bool:
    """Whether one item runs so much faster when all threads share it that it may be worth waking them.

    The fastest of several turns decides: other work on the machine lengthens turns, and those of several threads most.
    """
    # Any memory will do for tensors: one that is large enough for each.
    tensors = [np.zeros(max(1, stride * max(1, plan.tokens)), np.float32) for stride in plan.strides]
    addresses = (ctypes.c_int64 * len(tensors))(*[x.ctypes.data for x in tensors])
    runs = {}
    for plan.shares in (False, True):
        runs[plan.shares] = plan.prepare(ctypes.addressof(addresses), 1, None, plan.tokens)
    seconds = {shares: min(times) for shares, times in in_turns(runs, rounds=50, budget=0.002, limit=1.0).items()}
    return seconds[True] < min(0.95 * seconds[False], seconds[False] - LEAST_GAIN)


def _check_sequences(graph: Graph, leading: set[Shape], masks: list[Shape]) -> None:
    """Whether masks are as large as their scores, or repeated to it.

    Raises:
        Unfit: they are not, or there are no sequences.
    """
    for batch, *rest in leading:
        if len(rest) != 1:
            raise Unfit(f"rows with leading dimensions {(batch, *rest)} are no sequences")
        for mask, name in zip(masks, graph.masks, strict=True):
            heads = {node.groups for node in graph.users(name)}
            wanted = (batch, *(heads if len(heads) == 1 else {1}), rest[0], rest[0])
            if len(mask) != 4 or any(size not in (1, full) for size, full in zip(mask, wanted, strict=True)):
                raise Unfit(f"a mask has shape {mask}, which is not that of the scores, {wanted}, or 1 in places")
