"""The tables at the end of ``mirrormask train``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mirrormask.files import size_text
from mirrormask.train.run_folder import RunResult

__all__ = ["layer_table", "print_tables", "run_table"]


def run_table(results: Sequence[RunResult], *, reused: bool = False) -> Table:
    """One row a run, the dense one first; the others' accuracy also as the difference from it, in points."""
    table = Table(title=_title(results[0]), title_justify="left")
    table.add_column("method")
    several = any(result.processes > 1 for result in results)
    names = ["test accuracy", "against dense", "nonzeros asked", "obtained", "sparsity", "file", "time"]
    for name in [*names, *(["processes"] if several else [])]:
        table.add_column(name, justify="right")
    dense = results[0].test_accuracy
    for result in results:
        is_dense = result.method == "dense"
        again = " (reused)" if is_dense and reused else ""
        table.add_row(
            result.method,
            f"{100 * result.test_accuracy:.2f}%",
            "" if is_dense else f"{100 * (result.test_accuracy - dense):+.2f}",
            f"{result.nonzeros_asked:,}",
            f"{result.nonzeros:,}",
            f"{100 * result.sparsity:.3f}%",
            size_text(result.file_bytes),
            f"{result.seconds:.1f} s{again}",
            *([f"{result.processes} {result.parallel}"] if several else []),
        )
    return table


def layer_table(results: Sequence[RunResult]) -> Table:
    """One row a layer: its sparsity under each method."""
    sparse = [result for result in results if result.method != "dense"]
    table = Table(title="sparsity per layer", title_justify="left")
    for name in ("layer", "shape", "weights"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for result in sparse:
        table.add_column(result.method, justify="right")
    for i, layer in enumerate(results[0].layers):
        shape = "x".join(map(str, layer.shape))
        shares = [f"{100 * result.layers[i].sparsity:.2f}%" for result in sparse]
        table.add_row(layer.name, shape, f"{layer.numel:,}", *shares)
    return table


def print_tables(console: Console, results: Sequence[RunResult], *, reused: bool = False) -> None:
    """Print both tables; the layers' only where a run is sparse."""
    console.print(run_table(results, reused=reused))
    if any(result.method != "dense" for result in results):
        console.print(layer_table(results))


def _title(result: RunResult) -> str:
    recipe = result.recipe
    return f"{recipe['model']['name']} on {recipe['data']['name']}, {result.epochs} epochs, seed {result.seed}"
