"""The runs that may be compared with each other, with what the page's sections and headings ask of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mirrormask.compare import DENSE, Summary
from mirrormask.compare.budgets import file_costs, time_costs
from mirrormask.compare.comparison import Comparison, compare_runs
from mirrormask.report.labels import known_labels
from mirrormask.train.run_folder import RunResult

__all__ = ["Place", "Setting", "details", "pareto", "settle"]

#: A method at a sparsity.
Place = tuple[str, float]


@dataclass(frozen=True)
class Setting:
    """One comparison, ordered for showing.

    Args:
        comparison: its statistics.
        methods: every method once: the best first at :attr:`focus`, the dense one last.
        focus: the sparsity that headings speak of: where most methods are, the highest of these; 0 if all is dense.
        sizes: bytes of the model's file.
        times: seconds of one call, where ``mirrormask bench`` measured any run, on one processor and batch.
        conditions: of these times.
    """

    comparison: Comparison
    methods: tuple[str, ...]
    focus: float
    sizes: dict[Place, float]
    times: dict[Place, float]
    conditions: str

    @property
    def dense(self) -> Summary | None:
        """The dense method, if it was trained."""
        return next((row for row in self.comparison.summaries if row.method == DENSE), None)

    @property
    def sparse(self) -> list[Summary]:
        """Every other method at every sparsity."""
        return [row for row in self.comparison.summaries if row.method != DENSE]

    def at(self, sparsity: float) -> list[Summary]:
        """The sparse methods at one sparsity, the most accurate first."""
        return sorted((row for row in self.sparse if row.sparsity == sparsity), key=lambda row: -row.mean)


def settle(results: Sequence[RunResult]) -> Setting:
    """Compare the runs of one setting."""
    comparison = compare_runs(results, known=known_labels(results))
    groups: dict[Place, list[RunResult]] = {}
    for name, result in zip(comparison.labels, comparison.runs, strict=True):
        groups.setdefault((name, result.sparsity_asked), []).append(result)
    present = [row.sparsity for row in comparison.summaries if row.method != DENSE]
    focus = max(set(present), key=lambda s: (present.count(s), s), default=0.0)
    times, conditions = time_costs(groups)
    at_focus = {row.method: row.mean for row in comparison.summaries if row.sparsity == focus}
    names = dict.fromkeys(row.method for row in comparison.summaries)
    return Setting(
        comparison=comparison,
        methods=tuple(sorted(names, key=lambda name: (name == DENSE, -at_focus.get(name, 0.0), name))),
        focus=focus,
        sizes={(cost.method, cost.sparsity): cost.cost for cost in file_costs(groups)},
        times={(cost.method, cost.sparsity): cost.cost for cost in times},
        conditions=conditions,
    )


def pareto(points: Iterable[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats, by costing no more and being no less accurate, and better in one of both.

    Args:
        points: (cost, accuracy) of each.

    Example:
        >>> pareto([(1.0, 0.8), (2.0, 0.9), (3.0, 0.85), (2.0, 0.9)])
        [True, True, False, True]
    """
    all_points = list(points)
    return [
        not any(c <= cost and a >= accuracy and (c < cost or a > accuracy) for c, a in all_points)
        for cost, accuracy in all_points
    ]


def details(settings: Sequence[Setting]) -> list[str]:
    """The budget of each setting in words; numbered where that does not tell two of the same title apart."""
    result: list[str] = []
    seen: list[tuple[str, str]] = []
    for setting in settings:
        recipe = setting.comparison.runs[0].recipe
        optimizer, held_out = recipe["optimizer"], recipe["data"]["validation"]
        parts = [
            f"{optimizer['name']} at {optimizer['lr']:g}",
            f"batch {recipe['batch_size']}",
            *([f"{held_out:,} images held out"] if held_out else []),
        ]
        pair = (setting.comparison.title, ", ".join(parts))
        seen.append(pair)
        again = seen.count(pair)
        result.append(pair[1] if again == 1 else f"{pair[1]} ({again})")
    return result
