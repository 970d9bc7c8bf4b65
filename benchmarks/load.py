"""What large things take: reports, models of many tensors, comparisons of many cells; each beside its bound.

    python benchmarks/load.py                                          # everything; some minutes
    python benchmarks/load.py report --runs 1000 --lines 1000000
    python benchmarks/load.py tensors --tensors 100000
    python benchmarks/load.py compare --cells 1000

Each is measured in a process of its own, memory as the highest resident size above what an idle process with the same
imports has. Times are wall clock: nothing else may run. With --cpu they are processor time, where others run; sharing a
core's caches makes that longer too, never shorter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mirrormask as mm
from mirrormask.environment import processor

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / name) for name in ("report", "compare")]


#: What tells the time.
CLOCK = time.perf_counter


def peak() -> float:
    """The highest resident size of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(what: str, seconds: float, bound: float, memory: float | None = None, most: float | None = None) -> None:
    """One line of the table."""
    size = "" if memory is None else f"{memory:,.0f} MB (at most {most:,.0f})"
    good = seconds <= bound and (memory is None or most is None or memory <= most)
    print(f"| {what} | {seconds:.2f} s | {bound:g} s | {size} | {'yes' if good else '**no**'} |", flush=True)


def report(values: argparse.Namespace, folder: Path) -> None:
    """A page about many runs, and one about a run with a long log."""
    import synthetic_runs

    from mirrormask.report.page import report as write

    methods, sparsities = ("mirror", "pilot", "spred", "gmp"), (0.9, 0.95, 0.99)
    seeds = -(-values.runs // (len(methods) * len(sparsities) + 1))
    runs = synthetic_runs.make_grid(folder / "runs", methods, sparsities, seeds, lines=10, timed=True)
    (folder / "long").mkdir()
    synthetic_runs.make_run(folder / "long" / "run")
    lines = (folder / "long" / "run" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if '"step"' in line and '"event": "step"' in line]
    record = steps[0] if steps else {**json.loads(lines[0]), "event": "step"}
    with open(folder / "long" / "run" / "log.jsonl", "w", encoding="utf-8") as file:
        for i in range(values.lines):
            record |= {"step": i, "epoch_progress": 5 * i / values.lines, "loss": 1 / (i + 1)}
            file.write(json.dumps(record) + "\n")
    write([folder / "runs" / "dense-0"], folder / "warm.html")
    before = peak()
    for what, where in ((f"a report of {runs:,} runs", "runs"), (f"of a log of {values.lines:,} lines", "long")):
        start = CLOCK()
        write([folder / where], folder / f"{where}.html")
        row(what, CLOCK() - start, 10, peak() - before, 500)


def tensors(values: argparse.Namespace, folder: Path) -> None:
    """A model of very many small weights."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(values.tensors)))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    start = CLOCK()
    optimizer = mm.sparsify(model, base, mm.methods.get(values.method)(0.5), steps=values.steps)
    row(f"{values.method} of {values.tensors:,} tensors: sparsify", CLOCK() - start, 10)
    times = []
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        start = CLOCK()
        optimizer.step()
        times.append(CLOCK() - start)
    row("a step, the first", times[0], 1)
    row("a step, later", min(times[1:]), 1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain.step()
    start = CLOCK()
    plain.step()
    row("a step of torch.optim.SGD alone", CLOCK() - start, 1)
    start = CLOCK()
    optimizer.finalize()
    row("finalize", CLOCK() - start, 10)
    start = CLOCK()
    mm.save(model, folder / "m.safetensors")
    row("save", CLOCK() - start, 5)
    start = CLOCK()
    mm.load(folder / "m.safetensors", model)
    row("load", CLOCK() - start, 5)
    # What the same takes without us: safetensors, all of it dense.
    start = CLOCK()
    save_file(model.state_dict(), folder / "dense.safetensors")
    row("save with safetensors alone", CLOCK() - start, 5)
    start = CLOCK()
    model.load_state_dict(load_file(folder / "dense.safetensors"))
    row("load with safetensors alone", CLOCK() - start, 5)


def compare(values: argparse.Namespace, folder: Path) -> None:
    """What a comparison of many finished cells and one unfinished takes before that one starts."""
    import compare_forge
    from rich.console import Console

    from mirrormask.compare import runner, training
    from mirrormask.compare.grid import Cell
    from mirrormask.train.data import load

    cells = []
    for seed in range(values.cells):
        made = compare_forge.recipe(seed=seed, out=folder / "grid" / f"gmp-{seed}")
        cells.append(Cell("gmp", made))
        if seed:
            compare_forge.write(folder / "grid" / f"gmp-{seed}", seed=seed)
    began = []

    def first(todo, **_):
        began.append(CLOCK())
        return []

    runner.train_cells = first
    load(cells[0].recipe.data)
    start = CLOCK()
    training.train_missing(cells, folder / "grid", console=Console(quiet=True))
    row(f"a comparison of {values.cells:,} cells, one unfinished: until it starts", began[0] - start, 5)


KINDS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "report": report,
    "tensors": tensors,
    "compare": compare,
}


def _measure(name: str, values: argparse.Namespace) -> None:
    global CLOCK
    CLOCK = time.process_time if values.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        KINDS[name](values, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", *KINDS), default="all")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--method", default="gmp", help="of the many tensors")
    parser.add_argument("--steps", type=int, default=10, help="of that training; of 10, each changes the mask")
    parser.add_argument("--cpu", action="store_true", help="processor time, on a machine where others run")
    parser.add_argument("--cells", type=int, default=1000)
    values = parser.parse_args()
    print(f"{processor()}\n\n| what | took | bound | memory | kept |\n|---|---:|---:|---:|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    for name in KINDS if values.what == "all" else [values.what]:
        child = context.Process(target=_measure, args=(name, values))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{name} ended with {child.exitcode}")


if __name__ == "__main__":
    main()
