"""``mirrormask compare``: a grid to train, or runs made elsewhere, to one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mirrormask import checks, files, outcome
from mirrormask.compare import options

if TYPE_CHECKING:
    from rich.console import Console

    from mirrormask.compare.comparison import Comparison
    from mirrormask.compare.grid import Grid

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run ``mirrormask compare`` with these arguments; the exit status: 1 where a cell failed.

    Raises:
        TypeError, ValueError: anything in the arguments, the grid, the data or the folders that does not fit.
        OSError: the disk is full, or no Ray cluster answers.
    """
    grid, values = options.parse(arguments)
    # From here on it takes torch, which help on the options must not wait for.
    from mirrormask.compare import table
    from mirrormask.compare.comparison import compare_runs
    from mirrormask.compare.runs import Skipped, by_setting, load_runs
    from mirrormask.compare.training import train_grid

    checks.check_number("--gpus", values["gpus"], low=0)
    if values["workers"] is not None:
        checks.check_int("--workers", values["workers"], low=1)
    if (values["ray"] and values["workers"]) or (values["gpus"] and not values["ray"]):
        raise ValueError("--workers is for this machine, --gpus for a cluster that is named with --ray; leave one out")
    for folder in values["import"]:
        if not Path(folder).exists():
            raise ValueError(f"--import {folder!r} does not exist; name folders that hold finished runs")
    imported = load_runs(values["import"])
    console = _console()
    if grid is None:
        groups = list(by_setting(imported.results).values())
        apart = [Skipped(r.folder, "other data, model or budget") for group in groups[1:] for r in group]
        comparison = compare_runs(groups[0] if groups else [], skipped=[*imported.skipped, *apart])
        out = Path(values["out"])
    else:
        out = Path(grid.base.out)
        comparison = train_grid(grid, imported, console=console, **{k: values[k] for k in ("workers", "ray", "gpus")})
    if values["bench"]:
        comparison = _timed(comparison, console, grid)
    _write(comparison, out)
    table.print_comparison(console, comparison)
    names = ["comparison.md", "comparison.csv", "comparison.json", *_page(comparison, out, console)]
    console.print(f"in {out}: {', '.join(names)}", markup=False)
    outcome.tell({"folder": out, **json.loads(table.to_json(comparison))})
    return 1 if comparison.failures else 0


def _timed(comparison: Comparison, console: Console, grid: Grid | None) -> Comparison:
    """Time one run of each method and sparsity that has no measurement, after each other on one thread."""
    import torch

    from mirrormask.compare.comparison import compare_runs
    from mirrormask.compare.runs import measured
    from mirrormask.runtime import bench
    from mirrormask.train.trained import load_model

    seen = {(n, r.sparsity_asked) for n, r in zip(comparison.labels, comparison.runs, strict=True) if measured(r)}
    for name, result in zip(comparison.labels, comparison.runs, strict=True):
        # A run from elsewhere is left as it is.
        own = grid is not None and Path(result.folder).parent == Path(grid.base.out)
        if own and (name, result.sparsity_asked) not in seen:
            seen.add((name, result.sparsity_asked))
            example = torch.randn(1, *result.input_shape, generator=torch.Generator().manual_seed(0))
            path = Path(result.folder) / "bench.json"
            timed = bench(
                load_model(result.folder, allow_code=True), example, threads=1, engines=("eager",), json_path=path
            )
            console.print(
                f"{name} {100 * result.sparsity_asked:g}%: {1e6 * timed.seconds['mirrormask']:.1f} µs", markup=False
            )
    known = grid.known if grid is not None else None
    return compare_runs(comparison.runs, known=known, skipped=comparison.skipped, failures=comparison.failures)


def _page(comparison: Comparison, out: Path, console: Console) -> list[str]:
    """The report on these runs, and on the cells that have none; without Plotly the tables are all there is."""
    from mirrormask import report

    folders = [*(result.folder for result in comparison.runs), *(failure.folder for failure in comparison.failures)]
    try:
        return [report.write(folders, out / "report.html").name]
    except ImportError as error:
        text = f"no report.html: {error}"
        outcome.warn(text, partial(console.print, markup=False), text)
        return []


def _write(comparison: Comparison, out: Path) -> None:
    from mirrormask.compare import table

    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "comparison.json", table.to_json(comparison))
    files.write_text(out / "comparison.csv", table.to_csv(comparison))
    files.write_text(out / "comparison.md", table.markdown(comparison))


def _console() -> Console:
    from mirrormask.train import command

    console: Console = command._console()
    return console
