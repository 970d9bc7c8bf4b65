"""The names that a comparison gave its methods, from the ``comparison.json`` beside its runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirrormask.train.run_folder import RunResult

__all__ = ["known_labels"]


def known_labels(results: Iterable[RunResult]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (method, options), for runs that a comparison trained; {} for others.

    A comparison that was moved is read where it is now: a run is known by its folder's name. A label that stands for
    two different methods, in two comparisons, is left out.
    """
    told: dict[Path, dict[str, str]] = {}
    known: dict[str, tuple[str, dict[str, Any]]] = {}
    doubtful = set()
    for result in results:
        folder = Path(result.folder)
        if folder.parent not in told:
            told[folder.parent] = _read(folder.parent / "comparison.json")
        label = told[folder.parent].get(folder.name)
        if label is None:
            continue
        method = (result.recipe["method"]["name"], dict(result.recipe["method"]["options"]))
        if known.setdefault(label, method) != method:
            doubtful.add(label)
    return {label: method for label, method in known.items() if label not in doubtful}


def _read(path: Path) -> dict[str, str]:
    """Name of a run's folder -> its label; {} where there is no comparison, or it is damaged."""
    try:
        rows = json.loads(path.read_text("utf-8"))["runs"]
        return {Path(str(row["folder"])).name: str(row["method"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
