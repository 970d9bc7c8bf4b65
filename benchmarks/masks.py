"""Time and memory of choosing a mask.

    python benchmarks/masks.py [--weights 285] [--rounds 3] [--threads 2]

The layers are those of a transformer of 24 blocks: four square matrices and two of the feed-forward network each. Each
row is a process of its own, which chooses a mask once to warm up and then ``--rounds`` times. Seconds are the median;
memory is the growth of the peak of the resident set over scores (or weights and gradients, for exchange), masks included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from step import _resident, processor
from torch import Tensor

from mirrormask.masks import largest, select
from mirrormask.masks.scores import lamp

SPARSITY = 0.9


def layers(millions: float) -> list[Tensor]:
    """Random weights of 24 blocks, 144 tensors."""
    width = round((millions * 1e6 / 24 / 12) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return [torch.randn(shape, generator=generator) for _ in range(24) for shape in shapes]


def exchanged(weights: Sequence[Tensor]) -> list[Tensor]:
    """What an exchange of RigL chooses with: one k-th value of the weights and one of the gradients, a layer."""
    masks = []
    for x in weights:
        kept = largest(x, round(0.07 * x.numel()))
        masks.append(kept | largest(x.neg().masked_fill_(kept, -9.0), round(0.03 * x.numel())))
    return masks


ROWS: dict[str, Callable[[list[Tensor]], object]] = {
    "global": lambda scores: select(scores, SPARSITY),
    "uniform": lambda scores: select(scores, SPARSITY, "uniform"),
    "erk": lambda scores: select(scores, SPARSITY, "erk"),
    "global, many ties": lambda scores: select(scores, SPARSITY),
    "lamp, scores and global": lambda weights: select([lamp(x, torch.Generator()) for x in weights], SPARSITY),
    "exchange": exchanged,
}


def measure(row: str, millions: float, rounds: int, threads: int) -> tuple[float, float, int]:
    """Median seconds, peak bytes a weight, and how many weights."""
    torch.set_num_threads(threads)
    scores = [score.abs_() for score in layers(millions)]
    if "ties" in row:
        scores = [score.mul_(8).round_() for score in scores]
    count = sum(score.numel() for score in scores)
    ROWS[row](scores[:6])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, times = _resident("VmRSS"), []
    for _ in range(rounds):
        start = time.perf_counter()
        ROWS[row](scores)
        times.append(time.perf_counter() - start)
    return statistics.median(times), (_resident("VmHWM") - before) / count, count


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=285, help="millions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    print(f"{processor()}, {arguments.threads} threads, torch {torch.__version__}")
    for row in ROWS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            job = (row, arguments.weights, arguments.rounds, arguments.threads)
            seconds, peak, count = pool.apply(measure, job)
        print(f"  {row:<26}{count / 1e6:>8.0f} million weights{seconds:>9.2f} s{peak:>8.2f} bytes a weight", flush=True)


if __name__ == "__main__":
    main()
