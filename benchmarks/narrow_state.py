"""What ``state_dtype=torch.bfloat16`` costs in accuracy: LeNet-300-100 on Fashion-MNIST, seed by seed.

    python benchmarks/narrow_state.py --data DIR [--seeds 5] [--epochs 6] [--sparsity 0.95] [--out FILE]

The pairs differ in nothing else: initial weights and batches of a seed are the same. Writes a row a run, and prints
means, and the mean and standard error of the differences.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mirrormask as mm
from mirrormask.train import Data
from mirrormask.train.data import load
from mirrormask.train.models import build

BATCH, LR = 128, 0.1
METHODS = {"mirror": {}, "mirror, factors=False": {"factors": False}}


def accuracy(images: Any, seed: int, epochs: int, sparsity: float, options: dict[str, Any], dtype: Any) -> float:
    """Of one training, in per cent, on the test images."""
    mean, std = images.statistics()
    torch.manual_seed(seed)
    model = build("lenet-300-100", images.shape, len(images.classes))
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    count = len(images.train) // BATCH
    method = mm.methods.mirror(sparsity, **options)
    optimizer = mm.sparsify(model, base, method, steps=epochs * count, state_dtype=dtype)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for pick in torch.randperm(len(images.train), generator=generator)[: count * BATCH].split(BATCH):
            x, y = (images.train.x[pick] - mean) / std, images.train.y[pick]
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    optimizer.finalize()
    counted = mm.sparsity(model)
    assert counted.nonzeros == round((1 - sparsity) * counted.numel)
    with torch.no_grad():
        right = model((images.test.x - mean) / std).argmax(1) == images.test.y
    return round(100 * float(right.float().mean()), 2)


def main() -> None:
    """Train all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--out", type=Path, default=Path("docs/data/narrow_state.csv"))
    args = parser.parse_args()
    images = load(Data("fashion-mnist", args.data))
    rows: list[tuple[str, int, float, float]] = []
    for name, options in METHODS.items():
        for seed in range(args.seeds):
            found = [
                accuracy(images, seed, args.epochs, args.sparsity, options, dtype) for dtype in (None, torch.bfloat16)
            ]
            rows.append((name, seed, *found))
            print(f"{name:24} seed {seed}  float32 {found[0]:.2f}  bfloat16 {found[1]:.2f}", flush=True)
    for name in METHODS:
        pairs = [(full, narrow) for method, _, full, narrow in rows if method == name]
        full, narrow = (statistics.mean(values) for values in zip(*pairs, strict=True))
        differences = [b - a for a, b in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(pairs) > 1 else float("nan")
        difference = statistics.mean(differences)
        print(f"{name:24} float32 {full:.2f}  bfloat16 {narrow:.2f}  difference {difference:+.2f} ± {error:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        csv.writer(file).writerows([("method", "seed", "float32", "bfloat16"), *rows])


if __name__ == "__main__":
    main()
