"""The accuracy tables of docs/results.md: train a grid of runs, and write the table with means and intervals.

    python benchmarks/results.py fashion-mnist --data DIR            # LeNet-300-100, 10 epochs, 3 or 5 seeds
    python benchmarks/results.py cifar10 --data DIR/cifar10          # ResNet-20, the folder of images
    python benchmarks/results.py fashion-mnist --data DIR --tune     # what the settings were chosen from

Every cell is one run of `mirrormask train` in a folder of its own below --out; a finished one is not run again, so an
interrupted grid goes on where it stopped. Tuning holds 5,000 training images out and never looks at the test set: the
trials of benchmarks/settings.py, each at 98% and 99.5%; the best mean of the two sparsities is the setting that the
tables use.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from mirrormask.train import Recipe, run
from mirrormask.train.recipe import Data, Method, Model, Optimizer, Schedule
from settings import ADAMW_SETTINGS, ADAMW_TRIALS, SETTINGS, TRIALS

Options = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """A network, its budget, and the grid of runs on it."""

    data: Data
    model: Model
    optimizer: Optimizer
    epochs: int
    sparsities: tuple[float, ...]
    settings: dict[str, Options]
    trials: dict[str, list[Options]]
    seeds: dict[str, int]  # the default under ""
    threads: int

    def recipe(self, method: str, options: Options, sparsity: float, seed: int, out: Path, validation: int) -> Recipe:
        """One cell of the grid."""
        data = Data(**{**self.data.__dict__, "validation": validation})
        options = dict(options)
        optimizer = dataclasses.replace(self.optimizer, lr=options.pop("lr", self.optimizer.lr))
        return Recipe(
            data=data,
            model=self.model,
            method=Method(method.partition("/")[0], options),
            sparsity=sparsity,
            optimizer=optimizer,
            schedule=Schedule("cosine", 0.05),
            epochs=self.epochs,
            batch_size=128,
            seed=seed,
            threads=self.threads,
            log_every=10_000,
            out=str(out),
        )


def fashion_mnist(root: str) -> Suite:
    """LeNet-300-100 on Fashion-MNIST: SGD with momentum 0.9, lr 0.1, batch 128, no augmentation."""
    return Suite(
        data=Data("fashion-mnist", root=root),
        model=Model("lenet-300-100"),
        optimizer=Optimizer("sgd", lr=0.1, momentum=0.9),
        epochs=10,
        sparsities=(0.9, 0.95, 0.98, 0.99, 0.995),
        settings=SETTINGS,
        trials=TRIALS,
        seeds={"pilot/literal": 3, "": 5},
        threads=1,
    )


def fashion_mnist_adamw(root: str) -> Suite:
    """The same under AdamW with weight decay 0.01; the trials choose each method's learning rate."""
    return dataclasses.replace(
        fashion_mnist(root),
        optimizer=Optimizer("adamw", lr=1e-3, weight_decay=0.01),
        settings=ADAMW_SETTINGS,
        trials=ADAMW_TRIALS,
        seeds={"": 3},
    )


def cifar10(root: str) -> Suite:
    """ResNet-20 with a stride-2 stem on CIFAR-10 (16x16 feature maps at first): crops and flips, weight decay 5e-4."""
    return Suite(
        data=Data(f"folder:{root}", crop=4, flip=True),
        model=Model("resnet20", {"stem_stride": 2}),
        optimizer=Optimizer("sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        epochs=4,
        sparsities=(0.95,),
        settings={"dense": {}, "gmp": {}, "pilot": SETTINGS["pilot"], "mirror": SETTINGS["mirror"]},
        trials={},
        seeds={"": 2},
        threads=1,
    )


SUITES = {"fashion-mnist": fashion_mnist, "fashion-mnist-adamw": fashion_mnist_adamw, "cifar10": cifar10}


def accuracy(recipe: Recipe) -> float:
    """Train one cell, or read its result if it is there; the validation accuracy if there is a split."""
    result = run(recipe, resume=True)
    value = result.test_accuracy if result.validation_accuracy is None else result.validation_accuracy
    if result.nonzeros != result.nonzeros_asked:
        raise AssertionError(f"{recipe.out}: {result.nonzeros} nonzeros instead of {result.nonzeros_asked}")
    return 100 * value


def label(method: str, options: Options) -> str:
    """A method and what differs from its defaults."""
    return " ".join([method, *(f"{key}={value}" for key, value in options.items())])


def train_all(recipes: dict[tuple[str, float, int], Recipe], workers: int) -> dict[tuple[str, float, int], float]:
    """Every cell, ``workers`` at a time, with a line when one is done."""
    results: dict[tuple[str, float, int], float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(accuracy, recipe): key for key, recipe in recipes.items()}
        for future in as_completed(futures):
            key = futures[future]
            results[key] = future.result()
            print(f"[{len(results)}/{len(recipes)}] {key[0]} {key[1]:g} seed {key[2]}: {results[key]:.2f}", flush=True)
    return results


def interval(values: list[float]) -> float:
    """Half of the 95% interval of the mean, by Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def table(results: dict[tuple[str, float, int], float]) -> str:
    """Markdown: a row a method, a column a sparsity, mean ± 95% interval; dense has one value for all."""
    sparsities = sorted({sparsity for _, sparsity, _ in results if sparsity > 0})
    lines = ["| test accuracy, % | " + " | ".join(f"{100 * s:g}%" for s in sparsities) + " |"]
    lines.append("|---|" + "---|" * len(sparsities))
    for method in dict.fromkeys(method for method, _, _ in results):
        cells = []
        for sparsity in sparsities:
            values = [v for (m, s, _), v in results.items() if m == method and s in (sparsity, 0.0)]
            cells.append(f"{statistics.mean(values):.2f} ± {interval(values):.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(results: dict[tuple[str, float, int], float], ours: str, theirs: str) -> str:
    """``ours`` minus ``theirs``, paired over the seeds that both have: mean ± 95% interval for each sparsity."""
    parts = []
    for sparsity in sorted({s for m, s, _ in results if m == ours}):
        seeds = sorted(
            {seed for m, s, seed in results if m == ours and s == sparsity}
            & {seed for m, s, seed in results if m == theirs and s == sparsity}
        )
        pairs = [results[ours, sparsity, seed] - results[theirs, sparsity, seed] for seed in seeds]
        parts.append(f"{100 * sparsity:g}%: {statistics.mean(pairs):+.2f} ± {interval(pairs):.2f}")
    return f"{ours} - {theirs}, paired over seeds: " + "; ".join(parts)


def main() -> None:
    """Run a grid and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--data", required=True, help="where the data set is")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--tune", action="store_true", help="run the trials on held-out training images instead")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the accuracies here")
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite](arguments.data)
    settings = suite.trials if arguments.tune else {method: [options] for method, options in suite.settings.items()}
    settings = {method: trials for method, trials in settings.items() if method in (arguments.methods or settings)}
    sparsities = (0.98, 0.995) if arguments.tune else suite.sparsities
    recipes = {}
    for seed, sparsity, (method, trials) in itertools.product(range(5), sparsities, settings.items()):
        seeds = arguments.seeds or (1 if arguments.tune else suite.seeds.get(method, suite.seeds[""]))
        for options in trials if seed < seeds else ():
            level = 0.0 if method == "dense" else sparsity
            name = label(method, options) if arguments.tune else method
            folder = arguments.out / arguments.suite / ("tune" if arguments.tune else "test")
            out = folder / f"{label(method, options)}-{level:g}-{seed}".replace(" ", "-").replace("/", "-")
            validation = 5000 if arguments.tune else 0
            recipes[name, level, seed] = suite.recipe(method, options, level, seed, out, validation)
    results = train_all(recipes, arguments.workers)
    results = {key: results[key] for key in recipes}
    print("\n" + table(results))
    if not arguments.tune:
        print("\nsettings: " + "; ".join(label(method, trials[0]) for method, trials in settings.items()))
        for theirs in ("gmp", "pilot"):
            if {"mirror", theirs} <= settings.keys():
                print(differences(results, "mirror", theirs))
    if arguments.json:
        rows = [{"method": m, "sparsity": s, "seed": seed, "accuracy": v} for (m, s, seed), v in results.items()]
        arguments.json.write_text(json.dumps({"suite": arguments.suite, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
