"""All that a page shows, gathered from folders into one tree that JSON can hold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrormask.compare import DENSE, Pair, Runs, Skipped, by_setting, load_runs
from mirrormask.report.findings import findings
from mirrormask.report.reproduce import environment
from mirrormask.report.runs import add_details, entry, points
from mirrormask.report.setting import Setting, details, pareto, settle
from mirrormask.train import recipe_file
from mirrormask.train.reference import dense_folder
from mirrormask.train.run_folder import RunResult

__all__ = ["Material", "gather"]

#: How many of the things that were passed over an error names.
NAMED = 8


@dataclass(frozen=True)
class Material:
    """What was found.

    Args:
        settings: the comparisons, the one with most runs first.
        skipped: what was found and is not shown.
        tree: everything, for the page's scripts.
    """

    settings: tuple[Setting, ...]
    skipped: tuple[Skipped, ...]
    tree: dict[str, Any]

    @property
    def runs(self) -> int:
        """How many runs the page shows."""
        return len(self.tree["runs"])


def gather(folders: Sequence[str | Path]) -> Material:
    """Read every run at or below ``folders``, and the dense runs that they are compared with.

    Raises:
        ValueError: there is no finished run.
    """
    found = _with_dense(folders)
    if not found.results:
        names = [f"\n  {entry.path}: {entry.reason}" for entry in found.skipped[:NAMED]]
        more = len(found.skipped) - len(names)
        rest = f"\n  and {more} more" if more > 0 else ""
        raise ValueError(f"there is no finished run to report on; train one first{''.join(names)}{rest}")
    settings = tuple(settle(group) for group in by_setting(found.results).values())
    skipped = [*found.skipped, *(entry for setting in settings for entry in setting.comparison.skipped)]
    return Material(settings, tuple(skipped), _tree(settings, skipped))


def _with_dense(folders: Sequence[str | Path]) -> Runs:
    """The runs, with those dense ones that ``mirrormask train`` left beside the folders that were named."""
    found = load_runs(folders)
    recipes = [(result, recipe_file.from_dict(result.recipe)) for result in found.results]
    here = {recipe.fingerprint() for _, recipe in recipes}
    beside: dict[str, Path] = {}
    for result, recipe in recipes:
        key = recipe.reference_key()
        if key in here or key in beside:
            continue
        folder = Path(result.folder).absolute()
        for shared in (folder.parent, folder.parent.parent):
            reference = dense_folder(recipe, shared)
            if reference.finished:
                beside[key] = reference.path
                break
    if not beside:
        return found
    more = load_runs(sorted(beside.values()))
    return Runs((*found.results, *more.results), (*found.skipped, *more.skipped))


def _tree(settings: Sequence[Setting], skipped: Sequence[Skipped]) -> dict[str, Any]:
    total = sum(len(setting.comparison.runs) for setting in settings)
    runs: list[dict[str, Any]] = []
    cells: list[tuple[int, str, float]] = []
    models: list[dict[str, Any]] = []
    environments: list[dict[str, Any]] = []
    shown = []
    reference: dict[int, int] = {}
    for number, (setting, detail) in enumerate(zip(settings, details(settings), strict=True)):
        first = len(runs)
        for name, result in zip(setting.comparison.labels, setting.comparison.runs, strict=True):
            place = {"setting": number, "method": setting.methods.index(name)}
            where = {
                "model": _index(models, _model(result)),
                "environment": _index(environments, environment(result)),
            }
            runs.append({**place, **where, **entry(result, runs=total)})
            cells.append((number, name, result.sparsity_asked))
        dense = {runs[i]["seed"]: i for i in range(first, len(runs)) if cells[i][1] == DENSE}
        for i in range(first, len(runs)):
            if runs[i]["seed"] in dense:
                reference[i] = runs[i]["dense"] = dense[runs[i]["seed"]]
        shown.append(_setting(setting, detail))
    add_details(runs, cells, reference)
    root = _root([run["folder"] for run in runs])
    for run in runs:
        run["folder"] = os.path.relpath(run["folder"], root) if root else run["folder"]
    return {
        "root": root,
        "points": points(total),
        "settings": shown,
        "runs": runs,
        "models": models,
        "environments": environments,
        "skipped": [[entry.path, entry.reason] for entry in skipped],
    }


def _setting(setting: Setting, detail: str) -> dict[str, Any]:
    comparison, rows = setting.comparison, setting.comparison.summaries
    front: dict[str, set[int]] = {}
    for name, cost in (
        ("sparsity", {(r.method, r.sparsity): 1 - r.sparsity for r in rows}),
        ("size", setting.sizes),
        ("time", setting.times),
    ):
        chosen = [i for i, row in enumerate(rows) if (row.method, row.sparsity) in cost]
        best = pareto((cost[rows[i].method, rows[i].sparsity], rows[i].mean) for i in chosen)
        front[name] = {i for i, is_best in zip(chosen, best, strict=True) if is_best}
    number = {name: i for i, name in enumerate(setting.methods)}
    return {
        "title": comparison.title,
        "detail": detail,
        "methods": setting.methods,
        "dense": number.get(DENSE),
        "accuracy": f"{comparison.accuracy} accuracy",
        "focus": setting.focus,
        "sparsities": sorted({row.sparsity for row in setting.sparse}),
        "conditions": setting.conditions,
        "notes": [note.replace("`", "") for note in comparison.notes],
        "findings": findings(setting),
        "cells": [
            {
                "method": number[row.method],
                "sparsity": row.sparsity,
                "n": len(row.seeds),
                "mean": row.mean,
                "half": row.half_width,
                "difference": row.difference_from_dense,
                "difference_half": row.difference_half_width,
                "bytes": setting.sizes.get((row.method, row.sparsity)),
                "call": setting.times.get((row.method, row.sparsity)),
                "front": [name for name in front if i in front[name]],
            }
            for i, row in enumerate(rows)
        ],
        "pairs": [[number[p.a], number[p.b], p.sparsity, len(p.seeds), *_test(p)] for p in comparison.pairs],
        "by_file": [dataclasses.asdict(row) for row in comparison.by_file],
        "by_time": [dataclasses.asdict(row) for row in comparison.by_time],
    }


def _test(pair: Pair) -> tuple[Any, ...]:
    return pair.difference, pair.half_width, pair.p, pair.p_corrected, pair.significant


def _model(result: RunResult) -> dict[str, Any]:
    return {
        "layers": [layer.name for layer in result.layers],
        "shapes": ["×".join(map(str, layer.shape)) for layer in result.layers],
        "numel": [layer.numel for layer in result.layers],
    }


def _root(folders: Sequence[str]) -> str:
    """The folder that holds all of several runs; "" for one run, or where only the whole disk does."""
    if len(folders) < 2:
        return ""
    try:
        root = os.path.commonpath(folders)
    except ValueError:  # some absolute and some not, or on several drives
        return ""
    return "" if root == os.path.abspath(os.sep) else root


def _index(known: list[dict[str, Any]], entry: dict[str, Any]) -> int:
    if entry not in known:
        known.append(entry)
    return known.index(entry)
