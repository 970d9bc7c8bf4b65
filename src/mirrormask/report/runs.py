"""One run as the page's data: what was asked and obtained, layers, timing, curves, and details where there is room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mirrormask.compare import measured
from mirrormask.report import blob, changes, distributions
from mirrormask.report.curves import curves
from mirrormask.report.reproduce import command
from mirrormask.train.run_folder import RunResult

__all__ = ["add_details", "entry", "points"]

#: Points that all curves of one name share; each run keeps at least 40 and at most 400.
POINTS = 30_000
#: Characters of JSON for all histograms, and for all changed predictions: with many runs some go without.
ROOM = {"distributions": 2_000_000, "changes": 1_500_000}


def points(runs: int) -> int:
    """The most points that a curve keeps on a page of so many runs."""
    return min(400, max(40, POINTS // max(1, runs)))


def entry(result: RunResult, *, runs: int) -> dict[str, Any]:
    """Everything about one run but its place among others.

    Args:
        result: the run.
        runs: how many are on the page; the more, the fewer points a curve keeps.
    """
    bench = measured(result)
    return {
        "folder": result.folder,
        "sparsity": result.sparsity_asked,
        "obtained": result.sparsity,
        "seed": result.seed,
        "nonzeros_asked": result.nonzeros_asked,
        "nonzeros": result.nonzeros,
        "numel": result.numel,
        "test": result.test_accuracy,
        "validation": result.validation_accuracy,
        "unpruned": result.unpruned_accuracy,
        "train": result.train_accuracy,
        "loss": result.train_loss,
        "epochs": result.epochs,
        "epochs_asked": result.recipe["epochs"],
        "steps": result.steps,
        "skipped": result.skipped_steps,
        "seconds": result.seconds,
        "bytes": result.file_bytes,
        "layers": [layer.nonzeros for layer in result.layers],
        "bench": None if bench is None else _bench(bench),
        "curves": curves(result.folder, points(runs)),
        "command": command(result),
    }


def add_details(entries: Sequence[dict[str, Any]], cells: Iterable[Any], reference: Mapping[int, int]) -> None:
    """Give entries their ``distributions`` and ``changes`` while there is room: one run of each cell before the others.

    Args:
        entries: of all runs.
        cells: of each run, what it shares with the runs that only another seed tells apart.
        reference: run -> the dense run that it is compared with.
    """
    met: dict[Any, int] = {}
    ranked = []
    for i, cell in enumerate(cells):
        met[cell] = met.get(cell, -1) + 1
        ranked.append((met[cell], i))
    room = dict(ROOM)
    predictions: dict[int, Any] = {}

    def predicted(i: int) -> Any:
        if i not in predictions:
            predictions[i] = changes.read(entries[i]["folder"])
        return predictions[i]

    for _, i in sorted(ranked):
        folder = entries[i]["folder"]
        if room["distributions"] > 0:
            _give(entries[i], "distributions", distributions.read(folder), room)
        dense = reference.get(i)
        if room["changes"] > 0 and dense is not None and dense != i and predicted(dense) is not None:
            own = changes.read(folder)
            _give(entries[i], "changes", own and changes.changes(predicted(dense), own), room)


def _give(target: dict[str, Any], name: str, value: Any, room: dict[str, int]) -> None:
    if value is None:
        return
    room[name] -= len(blob.script_json(value))
    if room[name] >= 0:
        target[name] = value


def _bench(bench: Mapping[str, Any]) -> dict[str, Any]:
    """Times of a call in each engine, and layer by layer; whatever does not look like that is left out."""
    seconds = bench["seconds"]
    report = bench.get("report")
    rows = report.get("layers") if isinstance(report, dict) else None
    layers = []
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and all(_is_number(row.get(name)) for name in ("seconds", "dense_seconds")):
            layers.append([str(row.get("layer")), str(row.get("kernel")), row["seconds"], row["dense_seconds"]])
    return {
        "seconds": {name: value for name, value in seconds.items() if _is_number(value)},
        "where": f"{bench['processor']}, {bench['threads']} thread(s), input {bench['shape']}",
        "layers": layers,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
