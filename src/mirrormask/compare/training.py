"""From a grid to a comparison: what is missing is trained, here or on a cluster, and joined with what is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mirrormask import files
from mirrormask.compare import data_file, runner
from mirrormask.compare.comparison import Comparison, Failure, compare_runs
from mirrormask.compare.grid import Cell, Grid, check_folders, describe
from mirrormask.compare.progress import Progress
from mirrormask.compare.runs import OWN, Runs, Skipped, load_runs, setting
from mirrormask.train import recipe_file
from mirrormask.train.data import Splits
from mirrormask.train.lock import locked
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunFolder, RunResult

__all__ = ["check_sessions", "train_grid", "train_missing"]


def train_grid(
    grid: Grid,
    imported: Runs | None = None,
    *,
    console: Console,
    workers: int | None = None,
    ray: str = "",
    gpus: float = 0.0,
) -> Comparison:
    """Train what is missing of a grid, and compare it with what is there.

    Args:
        grid: the cells.
        imported: finished runs from elsewhere. One of the grid's own cells is not trained again; others of
            the same data, model and budget join the table.
        console: where progress is shown.
        workers: cells side by side; by default as many as there are cores for.
        ray: the address of a Ray cluster, or ``auto``; empty trains on this machine.
        gpus: that a cell takes there.

    Raises:
        TypeError, ValueError: anything in the grid, the data or the folders that does not fit; nothing was trained.
        OSError: the disk is full, or no Ray cluster answers.
    """
    cells = grid.cells()
    imported = imported or Runs((), ())
    elsewhere, apart = _matching(imported.results, cells)
    failures = train_missing(
        [cell for cell in cells if _identity(cell.recipe) not in elsewhere],
        Path(grid.base.out),
        console=console,
        workers=workers,
        ray=ray,
        gpus=gpus,
        heading=_heading(grid, cells, len(elsewhere)),
    )
    own = load_runs([cell.recipe.out for cell in cells if RunFolder(cell.recipe.out).finished])
    results = [*own.results, *(result for result in imported.results if result not in apart)]
    skipped = [*own.skipped, *imported.skipped, *(Skipped(r.folder, "other data, model or budget") for r in apart)]
    return compare_runs(results, known=grid.known, skipped=skipped, failures=failures)


def train_missing(
    cells: Sequence[Cell],
    out: Path,
    *,
    console: Console,
    workers: int | None = None,
    ray: str = "",
    gpus: float = 0.0,
    heading: str = "",
) -> list[Failure]:
    """Train those of the cells that are not finished; see :func:`train_grid`.

    Args:
        cells: with one data set.
        out: the comparison's folder, which no other process may train in meanwhile.
        console, workers, ray, gpus: see :func:`train_grid`.
        heading: what to print before.

    Returns:
        What failed.
    """
    check_folders(cells)
    todo = [cell for cell in cells if not RunFolder(cell.recipe.out).finished]
    splits = check_sessions(todo)
    try:
        with locked(out / ".lock"):
            files.remove_parts(out, [data_file.NAME, *OWN])  # of a comparison that was killed
            if heading:
                console.print(heading, markup=False)
            console.print(f"{len(cells)} cells: {len(cells) - len(todo)} finished, {len(todo)} to train", markup=False)
            if splits is None:
                return []
            return _train(todo, len(cells) - len(todo), splits, out, console, workers, ray, gpus)
    except BlockingIOError as error:
        raise ValueError(
            f"another comparison is at work in {str(out)!r}; wait for its end, or choose another --out"
        ) from error


def check_sessions(cells: Sequence[Cell]) -> Splits | None:
    """Read the data and build every method at every sparsity once, so that a misfit shows before anything trains.

    Raises:
        TypeError, ValueError: naming the cell.
    """
    from mirrormask.train import data
    from mirrormask.train.randomness import isolated
    from mirrormask.train.session import Session, make_method

    if not cells:
        return None
    splits = data.load(cells[0].recipe.data)
    seen: set[tuple[str, float]] = set()
    for i, cell in enumerate(cells):
        # Methods that score weights on data would do so here, which takes a while; the first cell finds the rest.
        if (cell.label, cell.recipe.sparsity) in seen or (i and make_method(cell.recipe).reads_data):
            continue
        seen.add((cell.label, cell.recipe.sparsity))
        try:
            with isolated(cell.recipe.threads):
                Session(cell.recipe, splits)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{cell.name}: {error}") from error
    return splits


def _train(
    todo: Sequence[Cell],
    already: int,
    splits: Splits,
    out: Path,
    console: Console,
    workers: int | None,
    ray: str,
    gpus: float,
) -> list[Failure]:
    asked = todo[0].recipe.threads
    if ray:
        from mirrormask.compare import cluster

        joined = cluster.connect(ray)
        progress = Progress(console, todo, already)
        try:
            return cluster.train_cells(todo, ray=joined, threads=asked or 1, gpus=gpus, splits=splits, watcher=progress)
        finally:
            progress.stop()
            joined.shutdown()
    number, threads = runner.share(len(todo), workers, asked)
    console.print(f"{number} at a time, {threads} thread(s) each", markup=False)
    progress = Progress(console, todo, already)
    try:
        return runner.train_cells(todo, workers=number, threads=threads, splits=splits, scratch=out, watcher=progress)
    finally:
        progress.stop()


def _matching(results: Sequence[RunResult], cells: Sequence[Cell]) -> tuple[set[str], list[RunResult]]:
    """Which cells the imported runs are, and those that no cell can be compared with."""
    wanted = setting(cells[0].recipe)
    found, apart = set(), []
    for result in results:
        recipe = recipe_file.from_dict(result.recipe)
        if setting(recipe) == wanted:
            found.add(_identity(recipe))
        else:
            apart.append(result)
    return found & {_identity(cell.recipe) for cell in cells}, apart


def _identity(recipe: Recipe) -> str:
    # A run on another number of threads is the same cell, up to the order of sums.
    return dataclasses.replace(recipe, threads=None).fingerprint()


def _heading(grid: Grid, cells: Sequence[Cell], elsewhere: int) -> str:
    recipe = grid.base
    levels = ", ".join(f"{100 * s:g}%" for s in grid.sparsities) or "0%"
    seeds = ", ".join(str(seed) for seed in sorted({cell.recipe.seed for cell in cells}))
    lines = [
        f"{recipe.model.name} on {recipe.data.name}, {recipe.epochs} epoch{'s' * (recipe.epochs > 1)}, in {recipe.out}",
        f"methods: {'; '.join(describe(label, options) for label, options in grid.methods.items())}",
        f"sparsity: {levels}; seeds: {seeds}",
    ]
    return "\n".join([*lines, f"{elsewhere} cells are imported"] if elsewhere else lines)
