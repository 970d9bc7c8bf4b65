"""Fine-tuning a trained network to a sparsity: the grid of docs/results.md.

    python benchmarks/finetune.py lenet --data DIR                       # all of it, on Fashion-MNIST
    python benchmarks/finetune.py lenet --data DIR --part sgd/200        # one base optimizer and length
    python benchmarks/finetune.py resnet20 --data DIR/cifar10            # the folder of images
    python benchmarks/finetune.py lenet --data DIR --table               # the table of what is there

A network is trained densely, once a seed, and kept. Then every method fine-tunes it at every sparsity: first in trials,
one seed, on 5,000 training images that are held out from all training, then at the best trial over its seeds, on the
test set. Every method has the same number of trials: two settings (its defaults and one other) at each learning rate. A
trial or a run that has finished is a line of ``results.jsonl`` in the folder ``--out``, and is not run again: an
interrupted grid goes on where it stopped. Several processes may share a folder if their parts differ.

A network is a function in :data:`NETWORKS` that returns a :class:`Task`; one that comes with trained weights is added
by putting its function there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.compare.statistics import half_width
from mirrormask.train import Data
from mirrormask.train.batches import Batches
from mirrormask.train.data import Splits, load
from mirrormask.train.models import build

SPARSITIES = (0.8, 0.9, 0.95)
#: The two settings of each method, its defaults first.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{}, {"at": 0.2}],
    "gmp": [{}, {"end_at": 0.5}],
    "gmp_ham": [{}, {"a": 50.0}],
    "spred": [{}, {"alpha": 1e-3}],
    "pilot": [{}, {"alpha_init": 1e-4}],
    "mirror": [{}, {"end_at": 0.5}],
}
#: The learning rates that every method tries.
RATES = {"sgd": (0.01, 0.05), "adamw": (5e-4, 2e-3)}


class Cell(NamedTuple):
    """One training: a trial (on held-out images) or a run (on the test set)."""

    kind: str
    network: str
    base: str
    steps: int
    sparsity: float
    method: str
    options: str
    lr: float
    seed: int


@dataclass
class Task:
    """A network with its data.

    Args:
        make: a fresh network with what it was trained to, by seed; it may train it first and keep it.
        batches: an endless stream of training batches, by seed.
        accuracy: of a network, on ``"validation"`` or ``"test"``, in [0, 1].
        bases: the names of the base optimizers to fine-tune with.
        seeds: of the runs.
        settle: what follows ``finalize()``: batch norm is recalibrated, say.
    """

    make: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    accuracy: Callable[[nn.Module, str], float]
    bases: tuple[str, ...] = ("sgd", "adamw")
    steps: tuple[int, ...] = (200, 1000, 4000)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    settle: Callable[[nn.Module, int], None] = field(default=lambda model, seed: None)


def optimizer(base: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The base optimizer."""
    if base == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)


def fit(
    model: nn.Module, trained: Any, batches: Iterator[tuple[Tensor, Tensor]], steps: int, *, epoch: int = 100
) -> None:
    """``steps`` steps on a cosine without warm-up; the method hears of the training accuracy every ``epoch`` steps."""
    schedule = torch.optim.lr_scheduler.LambdaLR(trained, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    model.train()
    right = seen = 0
    for step in range(1, steps + 1):
        x, y = next(batches)
        trained.zero_grad()
        output = model(x)
        nn.functional.cross_entropy(output, y).backward()
        trained.step()
        schedule.step()
        right, seen = right + int((output.argmax(1) == y).sum()), seen + len(y)
        if isinstance(trained, mm.SparseOptimizer) and step % min(epoch, max(steps // 10, 1)) == 0:
            trained.epoch_end(score=right / seen)
            right = seen = 0


def train(task: Task, cell: Cell) -> dict[str, float]:
    """Fine-tune once; the accuracy and the sparsity, which is the one asked for."""
    torch.manual_seed(cell.seed)
    model, start = task.make(cell.seed), time.time()
    method = mm.methods.get(cell.method)(cell.sparsity, **json.loads(cell.options))
    sparse = mm.sparsify(model, optimizer(cell.base, model, cell.lr), method, steps=cell.steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, sparse, task.batches(cell.seed), cell.steps)
    try:
        sparse.finalize()
    except RuntimeError:  # it diverged
        return {"accuracy": 0.0, "seconds": time.time() - start}
    total = sum(x.numel() for x in sparse.weights.values())
    nonzeros, asked = mm.sparsity(model).nonzeros, round((1 - cell.sparsity) * total)
    if nonzeros != asked:
        raise AssertionError(f"{cell}: {nonzeros} nonzeros instead of {asked}")
    task.settle(model, cell.seed)
    split = "validation" if cell.kind == "trial" else "test"
    return {"accuracy": task.accuracy(model, split), "seconds": time.time() - start}


# -- the networks --------------------------------------------------------------------------------------------------


def _images(
    name: str, data: Splits, out: Path, rate: float, dense_steps: int, crop: int = 0, *, flip: bool = False
) -> Task:
    mean, std = data.statistics()
    cpu = torch.device("cpu")
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    loaders = {
        key: Batches(part, mean, std, 128, device=cpu, crop=crop, flip=flip) for key, part in parts.items() if part
    }

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            yield from loaders["train"].shuffled(generator)

    @torch.no_grad()
    def accuracy(model: nn.Module, split: str) -> float:
        model.eval()
        pairs = [(model(x).argmax(1) == y).float() for x, y in loaders[split].in_order()]
        return float(torch.cat(pairs).mean())

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = build(name, data.shape, len(data.classes))
        path = out / "dense" / f"{name}-{seed}.pt"
        if not path.exists():
            fit(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), batches(100 + seed), dense_steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path.with_suffix(f".{os.getpid()}"))
            path.with_suffix(f".{os.getpid()}").replace(path)
            line = {"dense": name, "seed": seed, "accuracy": accuracy(model, "test"), "steps": dense_steps}
            append(out / "results.jsonl", line)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def settle(model: nn.Module, seed: int) -> None:
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            stream = batches(seed)
            mm.recalibrate(model, [next(stream)[0] for _ in range(40)])

    return Task(make, batches, accuracy, settle=settle)


def lenet(data: str, out: Path) -> Task:
    """LeNet-300-100 on Fashion-MNIST; dense: three epochs of SGD at 0.1."""
    return _images("lenet-300-100", load(Data("fashion-mnist", root=data, validation=5000)), out, 0.1, 1290)


def resnet20(data: str, out: Path) -> Task:
    """ResNet-20 on CIFAR-10; dense: ten epochs of SGD at 0.1."""
    task = _images("resnet20", load(Data(f"folder:{data}", validation=5000)), out, 0.1, 3510, crop=4, flip=True)
    task.bases, task.seeds = ("sgd",), (0, 1, 2)
    return task


#: name -> a function of ``--data`` and ``--out``.
NETWORKS: dict[str, Callable[[str, Path], Task]] = {"lenet": lenet, "resnet20": resnet20}


# -- the grid ------------------------------------------------------------------------------------------------------


def append(path: Path, line: dict[str, Any]) -> None:
    """One line, in one write: what several processes append does not mix, and what is cut off is no whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(line) + "\n").encode())
    finally:
        os.close(handle)


def read(path: Path) -> dict[Cell, float]:
    """cell -> accuracy; a line that was cut off is left out, and its cell runs again."""
    found = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "cell" in line:
            found[Cell(*line["cell"])] = line["accuracy"]
    return found


def trials(network: str, base: str, steps: int, sparsity: float, method: str) -> list[Cell]:
    """Those of one method at one place of the grid."""
    return [
        Cell("trial", network, base, steps, sparsity, method, json.dumps(options), lr, 0)
        for options in SETTINGS[method]
        for lr in RATES[base]
    ]


def best(found: dict[Cell, float], tried: list[Cell]) -> Cell | None:
    """The trial with the highest accuracy, the first of equal ones; None while one is missing."""
    return max(tried, key=lambda cell: found[cell]) if all(cell in found for cell in tried) else None


def places(task: Task, network: str, parts: list[str], sparsities: tuple[float, ...]) -> Iterator[tuple[Any, ...]]:
    """(network, base, steps, sparsity) of the parts asked for, the short trainings first."""
    for steps in task.steps:
        for base in task.bases:
            if not parts or f"{base}/{steps}" in parts:
                yield from ((network, base, steps, sparsity) for sparsity in sparsities)


def complete(task: Task, place: tuple[Any, ...], methods: list[str], seeds: tuple[int, ...], path: Path) -> None:
    """Train what is missing at one place: the trials of all methods, then seed by seed the runs of all."""
    found = read(path)

    def ensure(cell: Cell) -> None:
        if cell not in found:
            result = train(task, cell)
            found[cell] = result["accuracy"]
            append(path, {"cell": list(cell), **result})
            print(*cell, f"{100 * result['accuracy']:.2f}%", f"{result['seconds']:.0f} s", flush=True)

    for method in methods:
        for cell in trials(*place, method):
            ensure(cell)
    for seed in seeds:
        for method in methods:
            chosen = best(found, trials(*place, method))
            assert chosen is not None
            ensure(chosen._replace(kind="run", seed=seed))


def table(path: Path, places: list[tuple[Any, ...]], methods: list[str], seeds: tuple[int, ...]) -> str:
    """Means over seeds with 95% intervals, and `mirror` - `gmp` paired; where `mirror` is behind any, it is marked."""
    found = read(path)
    lines = [
        "| test accuracy, % | " + " | ".join(methods) + " | mirror - gmp | seeds |",
        "|---" * (len(methods) + 3) + "|",
    ]
    for place in places:
        runs: dict[str, dict[int, float]] = {}
        for method in methods:
            chosen = best(found, trials(*place, method))
            cells = [chosen._replace(kind="run", seed=seed) for seed in seeds] if chosen else []
            runs[method] = {cell.seed: 100 * found[cell] for cell in cells if cell in found}
        shared = sorted(set.intersection(*(set(values) for values in runs.values())))
        if not shared:
            continue
        means = {method: statistics.fmean(runs[method][seed] for seed in shared) for method in methods}
        row = []
        for method in methods:
            width = half_width([runs[method][seed] for seed in shared])
            text = f"{means[method]:.2f}" + (f" ± {width:.2f}" if width is not None else "")
            row.append(f"**{text}**" if means[method] == max(means.values()) else text)
        lost = ""
        if {"mirror", "gmp"} <= set(methods):
            pairs = [runs["mirror"][seed] - runs["gmp"][seed] for seed in shared]
            width, mean = half_width(pairs), statistics.fmean(pairs)
            lost = f"{mean:+.2f}" + (f" ± {width:.2f}" if width is not None else "")
            lost += " (behind)" if mean < 0 else ""
        _, base, steps, sparsity = place
        lines.append(
            f"| {base}, {steps} steps, {100 * sparsity:g}% | " + " | ".join([*row, lost, str(len(shared))]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train what is missing of a grid, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--data", required=True, help="where the data set is")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--part", nargs="+", default=[], help="only these, as sgd/200")
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, help="how many, instead of the network's own")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out / arguments.network
    path = folder / "results.jsonl"
    task = NETWORKS[arguments.network](arguments.data, folder)
    known = [f"{base}/{steps}" for base in task.bases for steps in task.steps]
    if unknown := set(arguments.part) - set(known):
        parser.error(f"--part {' '.join(sorted(unknown))} is none of {', '.join(known)}")
    seeds = tuple(range(arguments.seeds)) if arguments.seeds else task.seeds
    grid = list(places(task, arguments.network, arguments.part, tuple(arguments.sparsity)))
    for place in [] if arguments.table else grid:
        complete(task, place, arguments.methods, seeds, path)
    print("\n" + table(path, grid, arguments.methods, seeds))


if __name__ == "__main__":
    main()
