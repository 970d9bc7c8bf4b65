"""All that is known of one comparison, ready to be written: statistics, costs, notes, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrormask.compare import budgets
from mirrormask.compare.runs import Skipped, held_out_accuracy, labels
from mirrormask.compare.statistics import Pair, Summary, paired_tests, summarize
from mirrormask.masks import Iterative
from mirrormask.train import recipe_file
from mirrormask.train.run_folder import RunResult

__all__ = ["Comparison", "Failure", "compare_runs"]


@dataclass(frozen=True)
class Failure:
    """A cell that could not be trained: its name, its folder, and the error: a line, then where it came from."""

    cell: str
    folder: str
    error: str

    @property
    def reason(self) -> str:
        """The error in one line."""
        return self.error.partition("\n")[0]


@dataclass(frozen=True)
class Comparison:
    """A comparison's results.

    Args:
        title: network, data and budget.
        accuracy: ``"test"`` or ``"validation"``: the images that accuracies are of.
        summaries, pairs: see :mod:`mirrormask.compare.statistics`.
        by_file: best accuracy within a file size.
        by_time: best accuracy within a time per call; empty where none was measured.
        time_conditions: processor, threads and batch of these times.
        notes: one line each on methods whose training differs in kind.
        runs: the results, with ``labels`` beside them.
        labels: the method's name in this comparison, for each run.
        skipped: what was found and not used.
        failures: cells without a result.
    """

    title: str
    accuracy: str
    summaries: tuple[Summary, ...]
    pairs: tuple[Pair, ...]
    by_file: tuple[budgets.Within, ...]
    by_time: tuple[budgets.Within, ...]
    time_conditions: str
    notes: tuple[str, ...]
    runs: tuple[RunResult, ...]
    labels: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    failures: tuple[Failure, ...] = ()


def compare_runs(
    results: Sequence[RunResult],
    *,
    known: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
    skipped: Sequence[Skipped] = (),
    failures: Sequence[Failure] = (),
) -> Comparison:
    """Compare runs of one setting (see :func:`mirrormask.compare.by_setting`).

    Args:
        results: the runs; of two with the same method, sparsity and seed the first counts, the other is skipped.
        known: label -> (method, options), as in :func:`mirrormask.compare.labels`.
        skipped, failures: what to say besides.

    Raises:
        ValueError: there is no run.
    """
    if not results:
        raise ValueError("there is no finished run to compare" + "".join(f"\n  {s.path}: {s.reason}" for s in skipped))
    names = labels(results, known)
    passed_over = list(skipped)
    cells: dict[tuple[str, float, int], RunResult] = {}
    for name, result in zip(names, results, strict=True):
        first = cells.setdefault((name, result.sparsity_asked, result.seed), result)
        if first is not result:
            passed_over.append(Skipped(result.folder, f"the same method, sparsity and seed as {first.folder}"))
    summaries = summarize({key: held_out_accuracy(result) for key, result in cells.items()})
    pairs = paired_tests({key: held_out_accuracy(result) for key, result in cells.items()})
    groups: dict[tuple[str, float], list[RunResult]] = {}
    for (name, sparsity, _), result in cells.items():
        groups.setdefault((name, sparsity), []).append(result)
    times, conditions = budgets.time_costs(groups)
    first = results[0]
    return Comparison(
        title=title(first),
        accuracy="test" if first.validation_accuracy is None else "validation",
        summaries=summaries,
        pairs=pairs,
        by_file=budgets.best_within(budgets.file_costs(groups), summaries),
        by_time=budgets.best_within(times, summaries),
        time_conditions=conditions,
        notes=tuple(_notes(cells)),
        runs=tuple(cells.values()),
        labels=tuple(name for name, _, _ in cells),
        skipped=tuple(passed_over),
        failures=tuple(failures),
    )


def title(result: RunResult) -> str:
    """Network, data and budget of a run, for a heading."""
    recipe = result.recipe
    data = str(recipe["data"]["name"])
    data = f"the folder {Path(data).name}" if data.startswith("folder:") else data
    return f"{recipe['model']['name']} on {data}, {result.epochs} epoch{'s' * (result.epochs > 1)}"


def _notes(cells: Mapping[tuple[str, float, int], RunResult]) -> list[str]:
    """Methods that train in rounds have the same budget in all, but each round has a part of it only."""
    from mirrormask.train.session import make_method

    notes = {}
    for (name, _, _), result in cells.items():
        if name in notes:
            continue
        try:
            mask = make_method(recipe_file.from_dict(result.recipe)).mask
        except (TypeError, ValueError):  # a run of another version, whose method is not known here
            continue
        if isinstance(mask, Iterative):
            steps = mask.round_steps(result.steps)
            notes[name] = (
                f"`{name}` trains in {mask.prunings + 1} rounds; all of them share the {result.steps} steps that every "
                f"method has, and the first takes {steps}"
            )
    return list(notes.values())
