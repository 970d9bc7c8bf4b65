"""Calls that take turns with the dense engines: what the benchmarks of the runtime have in common."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mirrormask.machine.timing import SPINNING, in_turns
from mirrormask.runtime.engines import ENGINES, INT8_ENGINES, prepare_engines

__all__ = ["CLOCKS", "ENGINES", "INT8_ENGINES", "STATISTICS", "race"]

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
#: Of the turns of a call: what it was like on a machine shared with others, and what it is like undisturbed.
STATISTICS: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "fastest": min}


def race(
    dense: nn.Module,
    x: Tensor,
    ours: dict[str, Callable[[], object]],
    *,
    threads: int,
    engines: Sequence[str],
    rounds: int,
    clock: str,
    limit: float = float("inf"),
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per call for each turn of the engines that can run ``dense`` and of ``ours``; why for the other engines.

    With several threads each turn begins after a rest in which other engines' threads stop spinning.
    """
    calls, missing = prepare_engines(dense, x, threads, engines)
    pause = SPINNING if threads > 1 else 0.0
    return in_turns(calls | ours, rounds, 0.05, CLOCKS[clock], pause=pause, limit=limit), missing
