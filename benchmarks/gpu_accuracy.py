"""One training of benchmarks/gpu.py: a method on CIFAR-10, forward and backward in a CUDA graph, its result as JSON.

    python benchmarks/gpu_accuracy.py '{"network": "resnet20", "method": "mirror", "sparsity": 0.98, "seed": 0, ...}' \\
        --data cifar10.npz --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpu_data
import mirrormask as mm
import networks

BATCH = 256
#: Runs of a warm-up on the side before a graph is captured, as torch asks for.
WARMUP = 3


def network(name: str) -> nn.Module:
    """ResNet-20 or, with a stem for small images, ResNet-18."""
    if name == "resnet20":
        return networks.resnet20()
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return networks.resnet(stem, (64, 128, 256, 512), 2, gpu_data.CLASSES)


class Gradients:
    """Forward and backward; on a GPU as a graph, which the host starts with one call."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.loss = torch.zeros((), device=x.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if x.is_cuda:
            self._capture()

    def _run(self) -> None:
        # bf16 on a GPU; a graph must not hold casts that autocast has cached from before.
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.x.is_cuda, cache_enabled=False):
            self.loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.loss.backward()

    def _capture(self) -> None:
        before = [buffer.clone() for buffer in self.model.buffers()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self.model.zero_grad(set_to_none=True)
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """The gradients of a batch, in each parameter's ``grad``."""
        self.x.copy_(x)
        self.y.copy_(y)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.model.zero_grad(set_to_none=True)
            self._run()


def make(run: dict[str, Any], model: nn.Module, steps: int, batches: list[Any]) -> Any:
    """The method's optimizer in the paper's setting: SGD 0.1, momentum 0.9, weight decay 1e-4."""
    base = torch.optim.SGD(model.parameters(), lr=run.get("lr", 0.1), momentum=0.9, weight_decay=1e-4)
    name, options = run["method"], run.get("options", {})
    method = mm.methods.dense() if name == "dense" else mm.methods.get(name)(run["sparsity"], **options)
    return mm.sparsify(model, base, method, steps=steps, batches=batches if method.reads_data else None)


def rate(step: int, steps: int) -> float:
    """A warm-up over 5% of the steps, then a cosine."""
    warmup = max(round(0.05 * steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def shuffled(images: gpu_data.Images, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, augmented at once on the device; an incomplete last batch is left out."""
    order = torch.randperm(len(images.train_x), device=images.train_x.device)
    x, y = gpu_data.augmented(images.train_x[order]), images.train_y[order]
    for start in range(0, len(x) - batch + 1, batch):
        yield x[start : start + batch], y[start : start + batch]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """On all images, in fp32."""
    model.eval()
    right = sum(
        (model(part).argmax(1) == label).sum() for part, label in zip(x.split(1000), y.split(1000), strict=True)
    )
    model.train()
    return float(right) / len(y)


def train(run: dict[str, Any], images: gpu_data.Images, batch: int = BATCH) -> dict[str, Any]:
    """Train, prune, estimate batch norm anew, and measure."""
    device = images.train_x.device
    torch.manual_seed(run["seed"])
    model = network(run["network"]).to(device, memory_format=torch.channels_last)
    steps = run["epochs"] * (len(images.train_x) // batch)
    first = list(shuffled(images, batch))[:10]
    optimizer = make(run, model, steps, first)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, optimizer.round_steps))
    gradients = Gradients(model, first[0][0].clone(), first[0][1].clone())
    start = time.perf_counter()
    with torch.backends.cudnn.flags(benchmark=True) if device.type == "cuda" else contextlib.nullcontext():
        for _ in range(run["epochs"]):
            for x, y in shuffled(images, batch):
                gradients(x, y)
                optimizer.step()
                scheduler.step()
            optimizer.epoch_end(score=0.0) if run["method"] == "pilot" else None
    loss = float(gradients.loss)
    optimizer.finalize()
    if run["method"] != "dense":
        mm.recalibrate(model, [x for x, _ in list(shuffled(images, batch))[:100]])
    counted = mm.sparsity(model)
    return {
        **run,
        "test_accuracy": accuracy(model, images.test_x, images.test_y),
        "loss": loss,
        "nonzeros": counted.nonzeros,
        "numel": counted.numel,
        "steps": optimizer.step_count,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Train one run and print its result as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=json.loads)
    parser.add_argument("--data", type=Path, help="what gpu_data.pack has written; without it images of nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    found = gpu_data.load(arguments.data) if arguments.data else gpu_data.noise(4 * arguments.batch)
    images = gpu_data.ready(*found, torch.device(arguments.device))
    print(json.dumps(train(arguments.run, images, arguments.batch)), flush=True)


if __name__ == "__main__":
    main()
