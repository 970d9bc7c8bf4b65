"""`mm.prune` on pretrained networks: its methods by the error of layers and of the whole (docs/results.md).

    python benchmarks/pretrained.py --fetch
    python benchmarks/prune_pretrained.py minilm
    python benchmarks/prune_pretrained.py efficientnet --data DIR/cifar10      # folders train/ and test/ of classes

The statistics of EfficientNet-Lite0's batch norm stay those of ImageNet: estimated anew on some CIFAR-10 images, they
cost the dense network nearly everything. Each cell is a line of `--out`; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrormask as mm
from pretrained import ROOT, efficientnet_lite0, embeddings, glosses, minilm, tokens

METHODS = ("magnitude", "wanda", "ria", "obs")
#: The classes of ImageNet that show a thing of CIFAR-10's classes, by number; antelopes stand for deer.
IMAGENET = {
    "airplane": [404, 895],
    "automobile": [436, 468, 511, 609, 627, 656, 661, 705, 751, 817],
    "bird": [*range(7, 25), *range(80, 101), *range(127, 147)],
    "cat": [*range(281, 286)],
    "deer": [350, 351, 352, 353],
    "dog": [*range(151, 269)],
    "frog": [30, 31, 32],
    "horse": [339],
    "ship": [403, 484, 510, 554, 625, 628, 724, 780, 814],
    "truck": [555, 569, 654, 675, 717, 779, 864, 867],
}


@dataclass(frozen=True)
class Task:
    """A network, what it is calibrated on, and how good a pruned copy is: numbers by name."""

    model: nn.Module
    batches: list[Any]
    judge: Callable[[nn.Module], dict[str, float]]


def language(root: Path, examples: int, held_out: int) -> Task:
    """MiniLM, on glosses: the cosine between the embeddings of the pruned and of the dense model."""
    model, tokenizer = minilm(root)
    texts = [gloss.text for gloss in glosses(root)[: examples + held_out]]

    def batches(part: list[str]) -> list[dict[str, Tensor]]:
        part = sorted(part, key=len)  # little padding
        return [tokens(tokenizer, part[i : i + 32]) for i in range(0, len(part), 32)]

    tests = batches(texts[examples:])
    with torch.no_grad():
        dense = torch.cat([embeddings(model, batch) for batch in tests])

    def judge(pruned: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = torch.cat([embeddings(pruned, batch) for batch in tests])
        return {"cosine": float((found * dense).sum(1).mean())}

    return Task(model, batches(texts[:examples]), judge)


def vision(root: Path, data: Path, examples: int, held_out: int) -> Task:
    """EfficientNet-Lite0 on CIFAR-10 at 96 pixels: the logits' relative error, and accuracy in CIFAR's classes."""
    model, names = efficientnet_lite0(root), sorted(IMAGENET)

    def images(part: str, count: int) -> tuple[Tensor, Tensor]:
        from torchvision.io import read_image

        files = [(path, c) for c, n in enumerate(names) for path in sorted((data / part / n).iterdir())[: count // 10]]
        small = torch.stack([read_image(str(path)) for path, _ in files]).float() / 127.5 - 1
        labels = torch.tensor([c for _, c in files])
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
        return nn.functional.interpolate(small[order], size=96, mode="bicubic"), labels[order]

    x, y = images("test", held_out)

    def outputs(net: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([net(part) for part in torch.split(x, 32)])

    dense = outputs(model)

    def judge(pruned: nn.Module) -> dict[str, float]:
        found = outputs(pruned)
        shares = torch.stack([found.softmax(1)[:, IMAGENET[name]].sum(1) for name in names], 1)
        return {
            "output error": float((found - dense).square().sum() / dense.square().sum()),
            "accuracy": 100 * float((shares.argmax(1) == y).float().mean()),
        }

    return Task(model, list(torch.split(images("train", examples)[0], 32)), judge)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=("minilm", "efficientnet"))
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as folders of images")
    parser.add_argument("--examples", type=int, help="to calibrate on; 96 glosses or 100 images")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/prune"))
    a = parser.parse_args()
    if a.network == "minilm":
        task = language(a.root, a.examples or 96, a.held_out)
    elif a.data is None:
        parser.error("efficientnet needs --data")
    else:
        task = vision(a.root, a.data, a.examples or 100, a.held_out)
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / f"{a.network}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not rows:
        rows.append({"method": "dense", "sparsity": 0.0, "layers": 0.0, **task.judge(task.model)})
        file.write_text(json.dumps(rows[0]) + "\n")
    for sparsity in map(float, a.sparsities.split(",")):
        for method in a.methods.split(","):
            if any((row["method"], row["sparsity"]) == (method, sparsity) for row in rows):
                continue
            pruned, start = copy.deepcopy(task.model), time.perf_counter()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*singular")  # the classifier has more inputs than images
                report = mm.prune(pruned, task.batches, sparsity, method, batch_norm=False)
            row = {"method": method, "sparsity": sparsity, "layers": report.error, **task.judge(pruned)}
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(row, flush=True)
    columns = [name for name in rows[0] if name not in ("method", "sparsity")]
    print("| sparsity | method | " + " | ".join(columns) + " |\n" + "|---" * (2 + len(columns)) + "|")
    for row in sorted(rows, key=lambda row: row["sparsity"]):
        print(f"| {row['sparsity']:.0%} | `{row['method']}` | " + " | ".join(f"{row[c]:.4g}" for c in columns) + " |")


if __name__ == "__main__":
    main()
