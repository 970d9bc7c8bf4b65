"""The tables of a comparison: Markdown, for a terminal, CSV and JSON, all from the same numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mirrormask import outcome
from mirrormask.compare.budgets import Within
from mirrormask.compare.comparison import Comparison
from mirrormask.compare.runs import held_out_accuracy
from mirrormask.compare.statistics import DENSE, Pair, Summary, Values, paired_tests, summarize
from mirrormask.files import size_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["accuracy_table", "differences", "markdown", "percent", "print_comparison", "to_csv", "to_json"]

Rows = list[list[str]]


def percent(mean: float, half_width: float | None, *, sign: bool = False) -> str:
    """A mean and its interval, in points: ``89.47 ± 0.12``; without an interval the mean alone.

    Example:
        >>> percent(0.8947, 0.0012), percent(-0.0031, None, sign=True)
        ('89.47 ± 0.12', '-0.31')
    """
    points = round(100 * mean, 2) + 0.0  # no -0.00
    text = f"{points:+.2f}" if sign else f"{points:.2f}"
    return text if half_width is None else f"{text} ± {100 * half_width:.2f}"


def accuracy_table(values: Values, *, accuracy: str = "test") -> str:
    """Markdown: a row a method, a column a sparsity, mean ± 95% interval; dense has one value for all.

    Example:
        >>> print(accuracy_table({("dense", 0.0, 0): 0.9, ("gmp", 0.95, 0): 0.8, ("gmp", 0.95, 1): 0.81}))
        | test accuracy, % | 95% | seeds |
        |---|---|---|
        | dense | 90.00 | 1 |
        | gmp | 80.50 ± 6.35 | 2 |
    """
    return _markdown(_accuracies(summarize(values), accuracy))


def differences(values: Values, ours: str, theirs: str) -> str:
    """One line: ``ours`` minus ``theirs``, paired over the seeds that both have, at each sparsity."""
    parts = []
    for pair in paired_tests({key: v for key, v in values.items() if key[0] in (ours, theirs)}):
        if pair.difference is not None:
            sign = 1 if pair.a == ours else -1
            parts.append(
                f"{_level(pair.sparsity)}: {percent(sign * pair.difference + 0.0, pair.half_width, sign=True)}"
            )
    return f"{ours} - {theirs}, paired over seeds: " + "; ".join(parts)


def markdown(comparison: Comparison) -> str:
    """The whole comparison as a Markdown page."""
    lines = [f"# {comparison.title}", ""]
    for heading, rows in _tables(comparison):
        lines += [heading, "", _markdown(rows), ""]
    lines += [f"{note}." for note in comparison.notes]
    lines += [f"Failed: {failure.cell}: {failure.reason}." for failure in comparison.failures]
    lines += [f"Skipped: {skipped.path}: {skipped.reason}." for skipped in comparison.skipped]
    return "\n".join(lines).rstrip() + "\n"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print every table, and what failed or was skipped."""
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(comparison.title)}[/]")
    for heading, rows in _tables(comparison):
        table = Table(title=escape(heading), title_justify="left")
        for i, name in enumerate(rows[0]):
            table.add_column(escape(name), justify="right" if i else "left")
        for row in rows[1:]:
            table.add_row(*map(escape, row))
        console.print(table)
    for note in comparison.notes:
        console.print(escape(note))
    for skipped in comparison.skipped:
        text = f"skipped: {skipped.path}: {skipped.reason}"
        outcome.warn(text, console.print, escape(text))
    for failure in comparison.failures:
        console.print(f"[bold red]failed[/]: {escape(failure.cell)}: {escape(failure.reason)}")


def to_csv(comparison: Comparison) -> str:
    """One line a method and sparsity: its summary, and its median file size and training time."""
    text = io.StringIO()
    names = ("mean", "half_width", "difference_from_dense", "difference_half_width")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "sparsity", "seeds", *names])
    for row in comparison.summaries:
        numbers = ["" if getattr(row, name) is None else f"{getattr(row, name):.6g}" for name in names]
        writer.writerow([row.method, f"{row.sparsity:g}", " ".join(map(str, row.seeds)), *numbers])
    return text.getvalue()


def to_json(comparison: Comparison) -> str:
    """Everything, with one short record a run; accuracies in [0, 1], sizes in bytes, times in seconds."""
    tree: dict[str, Any] = {
        field.name: getattr(comparison, field.name)
        for field in dataclasses.fields(comparison)
        if field.name not in ("runs", "labels")
    }
    tree["runs"] = [
        {
            "method": label,
            "sparsity": result.sparsity_asked,
            "seed": result.seed,
            "accuracy": held_out_accuracy(result),
            "test_accuracy": result.test_accuracy,
            "file_bytes": result.file_bytes,
            "seconds": result.seconds,
            "folder": result.folder,
        }
        for label, result in zip(comparison.labels, comparison.runs, strict=True)
    ]
    return json.dumps(tree, indent=1, default=dataclasses.asdict, allow_nan=False) + "\n"


def _tables(comparison: Comparison) -> list[tuple[str, Rows]]:
    """A heading and rows for each table that has something in it; the first row holds the column names."""
    kind = f"{comparison.accuracy} accuracy, %"
    tables = [(f"{kind}: mean over seeds ± 95% interval", _accuracies(comparison.summaries, comparison.accuracy))]
    against = [row for row in comparison.summaries if row.difference_from_dense is not None]
    if against:
        tables.append(("difference from dense, points, paired over seeds", _against_dense(against)))
    if comparison.pairs:
        heading = "differences between methods, points, paired over seeds (Holm's correction at each sparsity)"
        tables.append((heading, _pairs(comparison.pairs)))
    if comparison.by_file:
        tables.append(
            (f"best {kind} within a file size", _within(comparison.by_file, "file at most", "its file", size_text))
        )
    if comparison.by_time:
        heading = f"best {kind} within a time on the CPU ({comparison.time_conditions})"
        tables.append((heading, _within(comparison.by_time, "time at most", "its time", _time)))
    return tables


def _accuracies(summaries: Sequence[Summary], accuracy: str) -> Rows:
    def cell(row: Summary | None) -> str:
        return "" if row is None else percent(row.mean, row.half_width)

    return _by_sparsity(f"{accuracy} accuracy, %", summaries, cell)


def _against_dense(summaries: Sequence[Summary]) -> Rows:
    def cell(row: Summary | None) -> str:
        if row is None or row.difference_from_dense is None:
            return ""
        return percent(row.difference_from_dense, row.difference_half_width, sign=True)

    return _by_sparsity("method", summaries, cell)


def _by_sparsity(corner: str, summaries: Sequence[Summary], cell: Any) -> Rows:
    """A row a method, a column a sparsity, and the number of seeds last; ``2-3`` where it is not the same for all."""
    sparsities = sorted({row.sparsity for row in summaries if row.method != DENSE}) or [0.0]
    found = {(row.method, row.sparsity): row for row in summaries}
    rows = [[corner, *map(_level, sparsities), "seeds"]]
    for method in dict.fromkeys(row.method for row in summaries):
        counts = {len(row.seeds) for row in summaries if row.method == method}
        seeds = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
        rows.append([method, *(cell(found.get((method, 0.0 if method == DENSE else s))) for s in sparsities), seeds])
    return rows


def _pairs(pairs: Iterable[Pair]) -> Rows:
    rows = [["sparsity", "methods", "difference ± 95%", "seeds", "p", "p corrected", "significant"]]
    for pair in pairs:
        difference = "" if pair.difference is None else percent(pair.difference, pair.half_width, sign=True)
        tested = "not tested" if pair.p is None else ("yes" if pair.significant else "no")
        p, corrected = ("" if p is None else f"{p:.2g}" for p in (pair.p, pair.p_corrected))
        names = f"{pair.a} - {pair.b}"
        rows.append([_level(pair.sparsity), names, difference, str(len(pair.seeds)), p, corrected, tested])
    return rows


def _within(rows: Iterable[Within], limit: str, own: str, unit: Any) -> Rows:
    table = [[limit, "best", "sparsity", "accuracy", own]]
    for row in rows:
        accuracy = percent(row.mean, row.half_width)
        table.append([unit(row.limit), row.method, _level(row.sparsity), accuracy, unit(row.cost)])
    return table


def _markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _level(sparsity: float) -> str:
    return f"{100 * sparsity:g}%"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
