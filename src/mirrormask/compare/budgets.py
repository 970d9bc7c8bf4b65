"""The best accuracy within a file size or a time on the CPU, over the runs for which that was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mirrormask.compare.runs import measured
from mirrormask.compare.statistics import DENSE, Summary
from mirrormask.train.run_folder import RunResult

__all__ = ["Cost", "Within", "best_within", "file_costs", "time_costs"]


@dataclass(frozen=True)
class Cost:
    """What a method at a sparsity costs: the median over the seeds for which it was measured."""

    method: str
    sparsity: float
    cost: float


@dataclass(frozen=True)
class Within:
    """The most accurate method and sparsity whose cost is at most ``limit``; both in bytes, or both in seconds."""

    limit: float
    method: str
    sparsity: float
    mean: float
    half_width: float | None
    cost: float


Groups = Mapping[tuple[str, float], Sequence[RunResult]]


def file_costs(groups: Groups) -> tuple[Cost, ...]:
    """The size of ``model.safetensors``, in bytes.

    Args:
        groups: (method, sparsity) -> its runs.
    """
    return _costs(groups, lambda result: float(result.file_bytes))


def time_costs(groups: Groups) -> tuple[tuple[Cost, ...], str]:
    """The compiled model's time per call that ``mirrormask bench`` measured, in seconds, and under what conditions.

    Times compare only on one processor, number of threads and batch; of several such sets the one with the most
    runs is taken.

    Args:
        groups: (method, sparsity) -> its runs.

    Returns:
        The costs, and a line that names processor, threads and batch; nothing and "" where nothing was measured.
    """
    times: dict[str, dict[str, float]] = {}
    for result in (result for group in groups.values() for result in group):
        bench = measured(result)
        if bench is not None:
            images = bench["shape"][0] if isinstance(bench["shape"], list) and bench["shape"] else "?"
            where = f"{bench['processor']}, {bench['threads']} thread(s), {images} image(s) at a time"
            times.setdefault(where, {})[result.folder] = float(bench["seconds"]["mirrormask"])
    if not times:
        return (), ""
    where, chosen = max(times.items(), key=lambda item: len(item[1]))
    return _costs(groups, lambda result: chosen.get(result.folder)), where


def best_within(costs: Sequence[Cost], summaries: Sequence[Summary]) -> tuple[Within, ...]:
    """For each of a few limits, the best mean accuracy among all cells that keep it.

    The limits halve from the dense model's cost (from the largest, without one) down to the smallest that any cell
    keeps; where these are less than a factor of 8 apart, two limits lie between them in equal ratios. A limit that the
    same cell wins as the one below it says nothing new and is left out.

    Args:
        costs: one a cell at most.
        summaries: of the same cells.

    Example:
        >>> from mirrormask.compare import summarize
        >>> rows = summarize({("dense", 0.0, 0): 0.9, ("gmp", 0.9, 0): 0.8})
        >>> found = best_within([Cost("dense", 0.0, 800.0), Cost("gmp", 0.9, 150.0)], rows)
        >>> [(round(row.limit), row.method) for row in found]
        [(800, 'dense'), (150, 'gmp')]
    """
    if not costs:
        return ()
    mean = {(row.method, row.sparsity): row for row in summaries}
    top = next((c.cost for c in costs if c.method == DENSE), max(c.cost for c in costs))
    ratio = max(1.0, top / min(c.cost for c in costs))
    steps, factor = (math.floor(math.log2(ratio)), 2.0) if ratio >= 8 else (3, ratio ** (1 / 3))
    rows: list[Within] = []
    for i in range(steps, -1, -1):
        limit = top / factor**i * (1 + 1e-12)  # what costs exactly this is within, whatever the power's rounding
        kept = [c for c in costs if c.cost <= limit and (c.method, c.sparsity) in mean]
        if not kept:
            continue
        best = max(kept, key=lambda c: mean[c.method, c.sparsity].mean)
        row = mean[best.method, best.sparsity]
        if not rows or (rows[-1].method, rows[-1].sparsity) != (best.method, best.sparsity):
            rows.append(Within(limit, best.method, best.sparsity, row.mean, row.half_width, best.cost))
    return tuple(reversed(rows))


def _costs(groups: Groups, of: Callable[[RunResult], float | None]) -> tuple[Cost, ...]:
    costs = []
    for (method, sparsity), results in groups.items():
        values = [value for value in map(of, results) if value is not None]
        if values:
            costs.append(Cost(method, sparsity, statistics.median(values)))
    return tuple(costs)
