"""The accuracy tables of docs/results.md: train a grid of runs, and write the table with means and intervals.

    python benchmarks/results.py fashion-mnist --data DIR            # LeNet-300-100, 10 epochs, 5 seeds
    python benchmarks/results.py cifar10 --data DIR/cifar10          # ResNet-20, the folder of images
    python benchmarks/results.py fashion-mnist --data DIR --tune     # what the settings were chosen from

With `-adamw` behind the name: some methods, with AdamW; `fashion-mnist-others`: those that are not in the first table;
`cifar10-small`: a stem with stride 4 (feature maps of 8x8 at first) in fp32, a third of the time, hence more seeds.
The grids are recipes/compare-*.yaml, trained and tabled as `mirrormask compare` does it: every cell in a folder of its
own below --out, and a finished one not again, so that an interrupted grid goes on where it stopped. Tuning holds 5,000
training images out and never looks at the test set: the trials of benchmarks/settings.py, each at 98% and 99.5% (of
CIFAR-10 and the others: 98%); the best mean is the setting that the recipe has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from mirrormask.compare import Values, held_out_accuracy
from mirrormask.compare.grid import Grid, describe
from mirrormask.compare.options import load_grid
from mirrormask.compare.table import accuracy_table, differences
from mirrormask.compare.training import train_missing
from mirrormask.train import Model, Optimizer, RunResult
from settings import (
    ADAMW_SETTINGS,
    ADAMW_TRIALS,
    CIFAR_ADAMW_SETTINGS,
    CIFAR_ADAMW_TRIALS,
    CIFAR_TRIALS,
    OTHER_SETTINGS,
    OTHER_TRIALS,
    RESNET7_TRIALS,
    SMALL_SETTINGS,
    TRIALS,
)

RECIPES = Path(__file__).parent.parent / "recipes"


class Suite(NamedTuple):
    """A table: its recipe, which of the recipe's keys says where the data is, in what form, and the trials.

    Attributes:
        methods, sparsities, seeds: instead of the recipe's; methods with their settings.
        adamw: whether AdamW (weight decay 0.01) replaces the recipe's optimizer.
        small: whether the network has a stem with stride 4 and trains in fp32.
    """

    recipe: str
    key: str
    form: str
    trials: dict[str, list[dict[str, Any]]]
    trial_sparsities: tuple[float, ...] = (0.98, 0.995)
    methods: dict[str, dict[str, Any]] | None = None
    sparsities: tuple[float, ...] = (0.98, 0.995)
    seeds: tuple[int, ...] = (0, 1, 2)
    adamw: bool = False
    small: bool = False


FASHION = ("compare-fashion-mnist.yaml", "data.root", "{}")
CIFAR = ("compare-cifar10-resnet20.yaml", "data.name", "folder:{}")
SUITES = {
    "fashion-mnist": Suite(*FASHION, TRIALS),
    "fashion-mnist-others": Suite(*FASHION, OTHER_TRIALS, (0.98,), OTHER_SETTINGS, (0.98, 0.995), (0, 1)),
    "fashion-mnist-adamw": Suite(*FASHION, ADAMW_TRIALS, methods=ADAMW_SETTINGS, adamw=True),
    "cifar10": Suite(*CIFAR, CIFAR_TRIALS, (0.98,)),
    "cifar10-resnet7": Suite("compare-cifar10-resnet7.yaml", "data.name", "folder:{}", RESNET7_TRIALS, (0.98, 0.995)),
    "cifar10-adamw": Suite(*CIFAR, CIFAR_ADAMW_TRIALS, (0.98,), CIFAR_ADAMW_SETTINGS, (0.98, 0.99), (0, 1), True),
    "cifar10-small": Suite(*CIFAR, CIFAR_TRIALS, (0.98,), SMALL_SETTINGS, (0.98, 0.99), (0, 1, 2, 3), small=True),
    "cifar10-small-adamw": Suite(
        *CIFAR, CIFAR_ADAMW_TRIALS, (0.98,), CIFAR_ADAMW_SETTINGS, (0.98, 0.99), (0, 1, 2, 3), adamw=True, small=True
    ),
}


def make_grid(name: str, data: str, out: Path, *, tune: bool) -> Grid:
    """The grid of a suite's table, or that of its trials on held-out training images."""
    suite = SUITES[name]
    grid = load_grid(RECIPES / suite.recipe, {suite.key: suite.form.format(data), "out": out})
    if suite.adamw:
        base = dataclasses.replace(grid.base, optimizer=Optimizer("adamw", lr=1e-3, weight_decay=0.01))
        grid = dataclasses.replace(grid, base=base)
    if suite.small:
        model = Model("resnet20", {"stem_stride": 4})
        grid = dataclasses.replace(grid, base=dataclasses.replace(grid.base, model=model, precision="fp32"))
    if suite.methods is not None:
        grid = Grid(grid.base, suite.methods, suite.sparsities, {"": suite.seeds})
    if not tune:
        return grid
    base = dataclasses.replace(grid.base, data=dataclasses.replace(grid.base.data, validation=5000))
    methods = {describe(method, options): options for method, group in suite.trials.items() for options in group}
    return Grid(base, methods, suite.trial_sparsities, {"": (0,)})


def accuracies(grid: Grid, workers: int) -> Values:
    """Train what is missing of the grid, and read every accuracy; a cell that fails says so, and has none."""
    console = Console(highlight=False, soft_wrap=True)
    failures = train_missing(grid.cells(), Path(grid.base.out), console=console, workers=workers)
    failed = {failure.cell for failure in failures}
    values = {}
    for cell in [cell for cell in grid.cells() if cell.name not in failed]:
        result = RunResult.read(cell.recipe.out)
        if result.nonzeros != result.nonzeros_asked:
            raise AssertionError(f"{cell.name}: {result.nonzeros} nonzeros instead of {result.nonzeros_asked}")
        values[cell.label, result.sparsity_asked, result.seed] = held_out_accuracy(result)
    return values


def check_complete(grid: Grid, values: Values) -> None:
    """End with an error, after the table, if it lacks cells."""
    missing = len(grid.cells()) - len(values)
    if missing:
        raise SystemExit(f"{missing} of {len(grid.cells())} cells failed, see above the table")


def main() -> None:
    """Run a grid and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--data", required=True, help="where the data set is")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--tune", action="store_true", help="run the trials on held-out training images instead")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--sparsity", nargs="+", type=float, help="only these sparsities")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the accuracies here")
    arguments = parser.parse_args()
    folder = arguments.out / arguments.suite / ("tune" if arguments.tune else "test")
    grid = make_grid(arguments.suite, arguments.data, folder, tune=arguments.tune)
    methods = {m: o for m, o in grid.methods.items() if not arguments.methods or m.split()[0] in arguments.methods}
    seeds = {m: s for m, s in grid.seeds.items() if not m or m in methods}
    seeds = {"": tuple(range(arguments.seeds))} if arguments.seeds else seeds
    sparsities = tuple(arguments.sparsity or grid.sparsities)
    grid = dataclasses.replace(grid, methods=methods, seeds=seeds, sparsities=sparsities)
    values = accuracies(grid, arguments.workers)
    print("\n" + accuracy_table(values, accuracy="validation" if arguments.tune else "test"))
    if not arguments.tune:
        print("\nsettings: " + "; ".join(describe(method, options) for method, options in methods.items()))
        for theirs in [m for m in methods if m not in ("dense", "mirror") and "mirror" in methods]:
            print(differences(values, "mirror", theirs))
    if arguments.json:
        rows = [{"method": m, "sparsity": s, "seed": seed, "accuracy": 100 * v} for (m, s, seed), v in values.items()]
        arguments.json.write_text(json.dumps({"suite": arguments.suite, "rows": rows}, indent=1) + "\n")
    check_complete(grid, values)


if __name__ == "__main__":
    main()
