"""The time and the memory of choosing masks.

    python benchmarks/masks.py [--rows global uniform erk lamp exchange] [--blocks 9] [--width 1624] [--rounds 5]

The weights are the matrices of a transformer's blocks, four each: at the defaults 36, of 285 million weights together.
``global``, ``uniform`` and ``erk`` share a sparsity of 90% by magnitudes that are there; ``lamp`` shares
90% globally by scores that are made of the weights as far as they are needed; ``exchange`` is RigL's, layer by layer:
it drops 30% of the living tenth and grows as many by their gradients.

Each row runs in a process of its own. Its first run warms up and gives the peak: the growth of the resident set (Linux)
over what was there, the scores themselves taken off, masks included. Then follow the rounds, of which the table gives
the median, the fastest and the median of the processor's time. Where other processes want the same cores, set
``OMP_WAIT_POLICY=passive``: torch's threads otherwise spin while one of them waits for its turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirrormask.masks import Magnitudes, exchange, keep_count, select, select_lamp
from mirrormask.masks.keys import over_layers
from step import _resident, processor

SPARSITY = 0.9
ROWS = ("global", "uniform", "erk", "lamp", "exchange")


def shapes(blocks: int, width: int) -> list[tuple[int, int]]:
    """The matrices of so many blocks: attention's input and output, and the two of the feed-forward part."""
    return blocks * [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def draw(sizes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """Weights of a layer's usual size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).mul_(size[1] ** -0.5) for size in sizes]


def regrow(x: Tensor, gradient: Tensor, alive: Tensor) -> Tensor:
    """The mask after an exchange of 30% of the living weights."""
    count = int(alive.count_nonzero())
    dropped = round(0.3 * count)
    return exchange(x, alive, gradient, count - dropped, dropped)


def prepare(row: str, sizes: list[tuple[int, int]]) -> tuple[Callable[[], list[Tensor]], int]:
    """What a row times, and how many bytes a weight of scores it makes itself and keeps."""
    x, total = draw(sizes, 0), sum(rows * columns for rows, columns in sizes)
    if row == "lamp":
        return lambda: select_lamp([Magnitudes(layer) for layer in x], keep_count(total, SPARSITY)), 0
    if row == "exchange":
        gradients, alive = draw(sizes, 1), select([layer.abs() for layer in draw(sizes, 2)], SPARSITY, "erk")
        return lambda: over_layers(regrow, x, gradients, alive), 0
    scores = [layer.abs_() for layer in x]
    return lambda: select(scores, SPARSITY, row), 0


def measure(row: str, blocks: int, width: int, rounds: int, threads: int) -> dict[str, float]:
    """Seconds, and bytes a weight, of one row."""
    torch.set_num_threads(threads)
    sizes = shapes(blocks, width)
    total = sum(rows * columns for rows, columns in sizes)
    prepare(row, [(64, 64)])[0]()  # what the first call imports and allocates is not the row's
    run, made = prepare(row, sizes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _resident("VmRSS")
    masks = run()
    peak = (_resident("VmHWM") - before) / total - made
    wanted = keep_count(total, SPARSITY)
    assert row == "exchange" or sum(int(mask.sum()) for mask in masks) == wanted
    del masks
    wall, used = [], []
    for _ in range(rounds):
        start, start_used = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        used.append(time.process_time() - start_used)
    return {"median": statistics.median(wall), "least": min(wall), "cpu": statistics.median(used), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--width", type=int, default=1624)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    sizes = shapes(options.blocks, options.width)
    total = sum(rows * columns for rows, columns in sizes)
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, numpy {np.__version__}", end=", ")
    print(f"Python {platform.python_version()}\n{total / 1e6:.1f} million weights in {len(sizes)} tensors, float32\n")
    print(f"{'':<10}{'median':>10}{'fastest':>10}{'processor':>11}{'bytes a weight beside scores':>31}")
    for row in options.rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (row, options.blocks, options.width, options.rounds, options.threads))
        times = f"{found['median']:>8.2f} s{found['least']:>8.2f} s{found['cpu']:>9.2f} s"
        print(f"{row:<10}{times}{found['peak']:>31.2f}", flush=True)


if __name__ == "__main__":
    main()
