"""Choosing each layer's kernel by measuring the candidates on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime import cache, filtering
from mirrormask.runtime.layout import Layout, map_layout
from mirrormask.runtime.memory import MARGIN, Memory
from mirrormask.runtime.plan import Plan
from mirrormask.runtime.problem import Choice, Problem
from mirrormask.runtime.timing import median_seconds, own_time
from mirrormask.runtime.vectors import VectorProblem

__all__ = ["Tuner", "candidates", "default_choice", "direct_choice", "op_seconds"]

#: Sparsities from which on the sparse kernels are candidates beside ``winograd``, and up to which the dense ones are.
LEAST_SPARSE, MOST_DENSE = 0.2, 0.7
#: How many turns the last of the candidates get, how many candidates those are at most, and how much slower than the
#: fastest.
ROUNDS, FINALISTS, CLOSE = 9, 5, 1.4
#: Bytes that are read between turns, at most: more than any L2 cache holds.
MOST_AROUND = 1 << 22
#: What a block of input planes may take of a 32 KiB L1 cache.
L1_BYTES = 24 * 1024


def row_choices(rows: int, vectors: int, most: int) -> list[int]:
    """Row counts of a tile that waste little on the last, overlapping tile: the largest first, three at most."""
    found = [r for r in range(1, rows + 1) if r * vectors <= most and -(-rows // r) * r <= 1.15 * rows]
    useful = [r for r in found if r * vectors >= 4] or found[-1:]
    largest = sorted(useful, reverse=True)
    # One near 8 vectors (enough to hide latency, small enough for many planes), the largest, and one between.
    near = min(largest, key=lambda r: abs(r * vectors - 8), default=1)
    return sorted({near, *largest[:1], *largest[len(largest) // 2 : len(largest) // 2 + 1]}, reverse=True)


def candidates(problem: Problem | VectorProblem) -> Iterator[Choice]:
    """The choices worth measuring for a layer, best guess first."""
    if isinstance(problem, VectorProblem):
        yield from problem.candidates()
        return
    geometry, out, target = problem.geometry, problem.out, problem.target
    weight = problem.node.weight
    assert weight is not None
    columns = geometry.taps[1][1]
    shifted = bool(columns.min() < 0 or columns.max() > 0)
    # Shifted, the sums wait while a side is summed; of 16 registers that leaves too few, and some wait in memory.
    most = max(8, (target.registers - 4) // 2) if shifted else target.registers - 4
    x = geometry.aligned_layout(target.lanes)
    dense = weight.sparsity < MOST_DENSE and problem.node.groups == 1
    filtered = list(_winograd(problem, _unshared(problem))) if dense and not target.half else []
    if filtered and weight.sparsity < LEAST_SPARSE:
        pass  # sparse kernels take longer
    elif geometry.fits_aligned(x, out, most if shifted else 99):
        yield from _sparse("aligned", problem, x, out, most, whole_rows=shifted)
    else:
        layout = geometry.direct_layout(target.lanes)
        yield from _sparse("direct", problem, layout, _unshared(problem), target.registers - 4)
    yield from filtered
    if dense:
        yield from _dense(problem, _unshared(problem), 2 if filtered else 5)


def direct_choice(problem: Problem) -> Choice:
    """A choice without measuring that computes every output from its own inputs alone: none that filters rows."""
    return next(choice for choice in candidates(problem) if choice.kernel != "winograd")


def _unshared(problem: Problem) -> Layout:
    """The output's layout, or one without shared vectors for kernels that cannot fill those."""
    if problem.out.segments == 1:
        return problem.out
    return map_layout(*problem.geometry.out, problem.target.lanes, halo=0, gap=1)


def _sparse(
    kernel: str, problem: Problem, x: Layout, out: Layout, most: int, whole_rows: bool = False
) -> Iterator[Choice]:
    reach = int(np.ptp(problem.geometry.taps[0][1]))
    # With many nonzeros per block its size matters less, and packing each candidate takes long.
    dense = problem.node.weight is not None and problem.node.weight.sparsity < MOST_DENSE
    shares = (1.2, 6.0) if dense else (0.6, 1.2, 2.5, 6.0, 1e9)
    most_planes = _most_planes(problem, x) if problem.target.half else x.channels
    for rows, vectors in _tiles(out, most, whole_rows):
        width = x.pitch if vectors == out.vectors else vectors * x.lanes
        plane = (rows + reach) * width * problem.target.dtype.itemsize
        blocks = {max(1, min(x.channels, most_planes, round(share * L1_BYTES / plane))) for share in shares}
        for block in sorted(blocks):
            yield Choice(kernel, rows, vectors, -(-x.channels // -(-x.channels // block)))


def _most_planes(problem: Problem, x: Layout) -> int:
    """Input planes per block in half precision: as many as make sums of 16 terms, since long sums lose digits."""
    weight = problem.node.weight
    assert weight is not None
    groups = len(np.unique(problem.geometry.taps[1][1]))
    terms = weight.nonzeros / weight.shape[0] / groups
    return max(1, int(x.channels * 16 / max(16.0, terms)))


def _tiles(out: Layout, most: int, whole_rows: bool) -> list[tuple[int, int]]:
    if out.segments > 1:
        return (
            [(out.groups, 1)]
            if out.groups <= most or whole_rows
            else [(r, 1) for r in row_choices(out.groups, 1, most)]
        )
    if out.vectors <= most and (out.groups > 1 or whole_rows):
        return [(r, out.vectors) for r in row_choices(out.groups, out.vectors, most)]
    fitting = [v for v in range(1, most + 1) if out.vectors % v == 0]
    # Narrow tiles of long rows, which tokens are: more planes of them stay in the L1 cache.
    return [(1, v) for v in fitting if v >= 2 or v == fitting[-1]][:-4:-1]


def _dense(problem: Problem, out: Layout, number: int) -> Iterator[Choice]:
    """So many sets of accumulators, the largest ones."""
    registers = problem.target.registers
    found = []
    for channels in (6, 5, 4, 3, 2, 1):
        copies = 2 if problem.target.half else 1  # of the accumulators: of a chunk, and of all
        most = (registers - 1) // (copies * channels + 1)
        for vectors in (v for v in range(1, most + 1) if out.vectors % v == 0):
            for rows in row_choices(out.groups, vectors, most) if vectors == out.vectors else [1]:
                found.append((channels * rows * vectors, Choice("dense", rows, vectors, channels)))
    found.sort(key=lambda pair: -pair[0])
    yield from (choice for _, choice in found[:number])


def _winograd(problem: Problem, out: Layout) -> Iterator[Choice]:
    """The two largest sets of accumulators, if rows can be filtered."""
    rows = filtering.tile_rows(problem.geometry)
    registers = problem.target.registers
    sets = [
        (channels, vectors)
        for channels in (6, 5, 4, 3, 2, 1)
        for vectors in range(1, (registers - 1) // (channels + 1) + 1)
        if out.vectors % vectors == 0
    ]
    sets.sort(key=lambda pair: -pair[0] * pair[1])
    yield from (Choice("winograd", rows, vectors, channels) for channels, vectors in sets[:2] if rows)


def default_choice(problem: Problem | VectorProblem) -> Choice:
    """A good guess without measuring."""
    return next(iter(candidates(problem)))


class Tuner:
    """Measures the candidates of a layer and remembers the winner, on disk too.

    Args:
        key: under which the cache holds what was measured for this model before, for whatever input shape; ``""`` to
            neither read nor write it.
        measure: whether to measure at all; without, unknown layers get :func:`default_choice`.
        around: bytes that a call of the model reads besides a layer's own, see :class:`Trial`.
    """

    def __init__(self, key: str = "", *, measure: bool = True, around: int = 0) -> None:
        self.key, self.measure, self.around = key, measure, around
        self.choices: dict[str, Choice] = {}
        self.facts: dict[str, bool] = {}
        self._new = False
        self._read()

    def __call__(self, problem: Problem | VectorProblem) -> Choice:
        """The choice for a layer."""
        key = problem.key
        if key not in self.choices:
            found = list(dict.fromkeys(candidates(problem)))
            if self.measure and len(found) > 1:
                self.choices[key] = _fastest(problem, found, self.around)
                self._new = True
            else:
                self.choices[key] = found[0]
        return self.choices[key]

    def decide(self, question: str, measure: Callable[[], bool]) -> bool:
        """The answer to a question that measuring decides."""
        if question not in self.facts:
            self.facts[question] = measure()
            self._new = True
        return self.facts[question]

    def save(self) -> None:
        """Write what was measured since, beside what others wrote meanwhile."""
        if self.key and self.measure and self._new:
            self._read()
            choices = {name: asdict(choice) for name, choice in self.choices.items()}
            cache.store(self.key, {"choices": choices, "facts": self.facts})
            self._new = False

    def _read(self) -> None:
        known = (cache.load(self.key) or {}) if self.key and self.measure else {}
        choices = {name: Choice(**values) for name, values in known.get("choices", {}).items()}
        self.choices, self.facts = choices | self.choices, known.get("facts", {}) | self.facts

    def __getstate__(self) -> dict[str, Any]:
        # What is measured elsewhere is not for this machine's cache.
        return {**self.__dict__, "key": ""}


def _fastest(problem: Problem | VectorProblem, found: list[Choice], around: int) -> Choice:
    """First every choice a few times, then the good ones in turns, whose medians decide.

    Whatever else the machine does meets all of them, and is not left out: a neighbour that shares the cache takes more
    from a choice that needs more of it.
    """
    others = np.zeros(min(around, MOST_AROUND) // 4, np.float32)
    least = float("inf")
    trials: dict[Choice, tuple[float, Trial]] = {}
    for choice in found:
        trial = Trial(problem, choice, others)
        seconds = trial.seconds(least)
        least = min(least, seconds)
        trials[choice] = (seconds, trial)
        # Packed weights are large: those that are out of the race go.
        trials = {key: value for key, value in trials.items() if value[0] <= CLOSE * least}
    finalists = sorted(trials, key=lambda choice: trials[choice][0])[:FINALISTS]
    if len(finalists) == 1:
        return finalists[0]
    rounds = [[trials[choice][1].turn() for choice in finalists] for _ in range(ROUNDS)]
    return finalists[int(np.median(rounds, axis=0).argmin())]


class Trial:
    """A layer with one of its choices, as it finds the caches in its model: weights are not in them, the input is.

    Args:
        others: read before every turn, in place of what the other layers read.
    """

    def __init__(self, problem: Problem | VectorProblem, choice: Choice, others: npt.NDArray[np.float32]) -> None:
        self._others = others
        self._copying = 0.0
        if isinstance(problem, VectorProblem):
            op, numbers = problem.alone(choice)
            plan = Plan([op], numbers, [0], [], 1, problem.target.dtype)
            self._source = slice(MARGIN, MARGIN + problem.terms)
        else:
            plan = self._of_maps(problem, choice)
        self._tensors = np.zeros(1, np.int64)
        self._plan, self._run = plan, plan.prepare(self._tensors.ctypes.data, 1)

    def _of_maps(self, problem: Problem, choice: Choice) -> Plan:
        out = problem.out
        if choice.kernel != "aligned" and out.segments > 1:
            out = _unshared(problem)
            problem = Problem(problem.node, problem.geometry, out, problem.fused, problem.target, problem.threads)
        x = problem.input_layout(choice)
        between = problem.between(choice, x)
        memory = Memory()
        places = [0 if layout is None else memory.take(layout) for layout in (x, out, out, between)]
        ops = problem.ops(choice, x, *places)
        for op in ops:
            op.bounds = (0, op.units)
        # A layout of its own costs a copy; strided layers copy with every choice.
        if choice.kernel != "aligned" and problem.geometry.stride == (1, 1):
            self._copying = x.size * 4 / 1e10
        self._source = slice(places[0], places[0] + x.size)
        return Plan(ops, memory.size + 4096, [0], [], 1, problem.target.dtype)

    def seconds(self, least: float) -> float:
        """The fastest of three turns; of one, if that is twice ``least``."""
        self._run()
        first = self.turn()
        return min(first, self.turn(), self.turn()) if first < 2 * least else first

    def turn(self) -> float:
        """Seconds of one run, and of the copy that the choice needs."""
        self._others.max(initial=0.0)
        self._plan.memory[self._source] *= 1
        start = own_time()
        self._run()
        return own_time() - start + self._copying


def op_seconds(plan: Plan, index: int, tensors: int) -> float:
    """The time of one op, repeated in native code until the call from Python weighs little."""
    once = median_seconds(lambda: plan.run_op(index, tensors), repeats=1, clock=own_time)
    repeats = max(1, int(2e-4 / max(once, 1e-7)))
    return median_seconds(lambda: plan.run_op(index, tensors, repeats), budget=0.05, clock=own_time) / repeats
