"""Comparisons: a grid of runs, trained side by side, and what it shows.

:func:`load_runs` finds finished runs, :func:`summarize` and :func:`paired_tests` are the statistics, and
:mod:`mirrormask.compare.table` writes them; ``mirrormask compare`` trains the grid first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrormask.lazy import lazily

if TYPE_CHECKING:
    from mirrormask.compare.runs import Runs, Skipped, by_setting, held_out_accuracy, labels, load_runs, measured
    from mirrormask.compare.statistics import DENSE, Pair, Summary, Values, paired_tests, summarize

__all__ = [
    "DENSE",
    "Pair",
    "Runs",
    "Skipped",
    "Summary",
    "Values",
    "by_setting",
    "held_out_accuracy",
    "labels",
    "load_runs",
    "measured",
    "paired_tests",
    "summarize",
]

__getattr__ = lazily(
    __name__,
    {
        "DENSE": "mirrormask.compare.statistics",
        "Pair": "mirrormask.compare.statistics",
        "Runs": "mirrormask.compare.runs",
        "Skipped": "mirrormask.compare.runs",
        "Summary": "mirrormask.compare.statistics",
        "Values": "mirrormask.compare.statistics",
        "by_setting": "mirrormask.compare.runs",
        "held_out_accuracy": "mirrormask.compare.runs",
        "labels": "mirrormask.compare.runs",
        "load_runs": "mirrormask.compare.runs",
        "measured": "mirrormask.compare.runs",
        "paired_tests": "mirrormask.compare.statistics",
        "summarize": "mirrormask.compare.statistics",
    },
)
