"""How often weights change their sign while they become sparse (the figure of docs/studies.md, "Signs").

    python benchmarks/flips.py --data DIR [--steps 600] [--sparsity 0.95] [--out runs/flips]

HAM's authors say that the metric of ``m ⊙ w`` collapses at zero and stalls changes of sign (arXiv 2506.02630).
LeNet-300-100 on Fashion-MNIST, one seed and the same batches for every method; counted over the weights that live.
Writes ``flips.svg``, ``.png``, ``.csv`` and ``.txt``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.flow.figures import COLOURS, Experiment, canvas, legend
from mirrormask.train import Data
from mirrormask.train.data import load
from mirrormask.train.models import build

#: Label -> method, its options, and how it is drawn.
METHODS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gmp": ("gmp", {}, COLOURS["grey"], "-"),
    "gmp_ham": ("gmp_ham", {}, COLOURS["orange"], "-"),
    "mirror": ("mirror", {}, COLOURS["blue"], "-"),
    "mirror, no decay": ("mirror", {"shrink": 0.0}, COLOURS["blue"], "--"),
    "pilot": ("pilot", {"at": 0.75}, COLOURS["green"], "-"),
    "pilot, no decay": ("pilot_init", {"at": 0.75}, COLOURS["green"], "--"),
}
BATCH, EVERY, LR = 128, 100, 0.1


def flips(
    name: str, options: dict[str, Any], sparsity: float, steps: int, images: Any
) -> tuple[list[tuple[float, ...]], float]:
    """A row a per cent of training, and the accuracy.

    A row: progress, and of the living weights the shares that have another sign than at the start, that have changed it
    in the last per cent, and that are within a tenth of their layer's rms.
    """
    mean, std = images.statistics()
    torch.manual_seed(0)
    model = build("lenet-300-100", images.shape, len(images.classes))
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    optimizer = mm.sparsify(model, base, mm.methods.get(name)(sparsity, **options), steps=steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    weights = [p for p in model.parameters() if p.dim() > 1]
    start = last = [w.detach().clone() for w in weights]
    rows, right, seen = [], 0, 0
    for step in range(1, steps + 1):
        pick = torch.randint(len(images.train), (BATCH,), generator=generator)
        x, y = (images.train.x[pick] - mean) / std, images.train.y[pick]
        scores = model(x)
        nn.functional.cross_entropy(scores, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        right, seen = right + int((scores.argmax(1) == y).sum()), seen + BATCH
        if step % max(steps // 10, 1) == 0:
            optimizer.epoch_end(score=right / seen)
            right = seen = 0
        if step % max(steps // EVERY, 1) == 0:
            now = [w.detach().clone() for w in weights]
            living = sum(int(w.count_nonzero()) for w in now)
            counts = (_changed(start, now), _changed(last, now), _near(now))
            rows.append((step / steps, *(count / living for count in counts)))
            last = now
    optimizer.finalize()
    with torch.no_grad():
        scores = model((images.test.x - mean) / std)
    return rows, float((scores.argmax(1) == images.test.y).float().mean())


def _changed(before: list[Tensor], now: list[Tensor]) -> int:
    return sum(int((a * b < 0).sum()) for a, b in zip(before, now, strict=True))


def _near(now: list[Tensor]) -> int:
    rms = [w.square().sum().div(w.count_nonzero().clamp(min=1)).sqrt() for w in now]
    return sum(int(((w.abs() < size / 10) & (w != 0)).sum()) for w, size in zip(now, rms, strict=True))


def experiment(data: Path, sparsity: float, steps: int) -> Experiment:
    """All methods, one after another."""
    images = load(Data("fashion-mnist", root=str(data)))
    title = f"Signs of living weights, LeNet-300-100 on Fashion-MNIST, {sparsity:.0%} in {steps:,} steps"
    figure, (since, lately, near) = canvas(
        title, ["Changed since the start", "Changed in the last 1% of training", "Within a tenth of the layer's rms"]
    )
    rows, said = [], []
    for label, (name, options, colour, line) in METHODS.items():
        course, accuracy = flips(name, options, sparsity, steps, images)
        progress = [row[0] for row in course]
        for axis, column in ((since, 1), (lately, 2), (near, 3)):
            axis.plot(progress, [100 * row[column] for row in course], color=colour, ls=line, label=label)
        rows += [(label, *row) for row in course]
        total = sum(row[2] for row in course)
        said.append(
            f"{label} {100 * course[-1][1]:.0f}% ({total:.1f} changes a weight, {100 * accuracy:.1f}% accurate)"
        )
        print(said[-1], flush=True)
    for axis in (since, lately, near):
        axis.set(xlabel="fraction of training", ylabel="% of living weights", ylim=(0, None))
    legend(lately, "upper right")
    sentence = f"At the end the sign is not that of the start in: {'; '.join(said)}."
    return Experiment("flips", figure, ("method", "progress", "since_start", "last", "near_zero"), rows, sentence)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where Fashion-MNIST lies, or is fetched to")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--out", type=Path, default=Path("runs/flips"))
    options = parser.parse_args()
    found = experiment(options.data, options.sparsity, options.steps)
    print(found.sentence)
    print(*found.save(options.out), sep="\n")


if __name__ == "__main__":
    main()
