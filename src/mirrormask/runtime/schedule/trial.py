"""Timing a layer with one of its choices, and single ops of a plan."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mirrormask.machine.timing import median_seconds, own_time
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Choice, Problem

__all__ = ["Trial", "op_seconds"]


class Trial:
    """A layer with one of its choices, as it finds the caches in its model.

    Weights are not in them; the activations' memory is, which all layers of a model share, and the input last written.

    Args:
        others: read before every turn, in place of what the other layers read.
    """

    def __init__(self, problem: Problem, choice: Choice, others: npt.NDArray[np.float32]) -> None:
        self._others = others
        self.alone = problem.trial(choice)
        self._tensors = np.zeros(1, np.int64)
        self._run = self.alone.plan.prepare(self._tensors.ctypes.data, 1)

    def seconds(self, least: float) -> float:
        """The fastest of three turns; of one, if that is twice ``least``."""
        self._run()
        first = self.turn()
        return min(first, self.turn(), self.turn()) if first < 2 * least else first

    def turn(self) -> float:
        """Seconds of one run, and of the copy that the choice needs."""
        self._others.max(initial=0.0)
        memory = self.alone.plan.memory
        memory *= 1
        memory[self.alone.source] *= 1
        start = own_time()
        self._run()
        return own_time() - start + self.alone.copying


def op_seconds(plan: Plan, index: int, tensors: int) -> float:
    """The time of one op, repeated in native code until the call from Python weighs little."""
    once = median_seconds(lambda: plan.run_op(index, tensors), repeats=1, clock=own_time)
    repeats = max(1, int(2e-4 / max(once, 1e-7)))
    return median_seconds(lambda: plan.run_op(index, tensors, repeats), budget=0.05, clock=own_time) / repeats
