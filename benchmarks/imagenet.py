"""The row on ImageNet, for who has the cards: ResNet-50 from random weights, 100 epochs, one process a card.

    torchrun --nproc-per-node 8 benchmarks/imagenet.py DIR --method mirror --sparsity 0.9 --out runs/imagenet-mirror-0.9

DIR holds train/CLASS/ and val/CLASS/ of images, as torchvision's ImageFolder reads them. The same command goes on
after an interruption, at the last epoch. The literature's setting (PILoT's and HAM's: arXiv 2408.09966, 2506.02630):
batch 256 for each rate of 0.1 (1,024 and 0.4 here), SGD with momentum 0.9, weight decay 1e-4, label smoothing 0.1, five
epochs of warm-up and a cosine, random crops of 224 and flips, bf16. What is a reading of ours in it: smoothing and
warm-up. `--method dense` is the reference; acdc_ham, 77.20 / 76.66 / 75.45 at 80 / 90 / 95%, the number to beat.
**Nobody has run this at full size**: no figure is claimed; the test suite runs it on a folder of 24 images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision import datasets, models
from torchvision.transforms import v2

import mirrormask as mm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Images from which batch norm's statistics are estimated after pruning, and on which methods score weights.
STATISTICS = 25_600


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="mirror", choices=list(mm.methods.names()))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--options", type=json.loads, default={}, help="of the method: '{\"a\": 100.0}'")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1024, help="over all processes together")
    parser.add_argument("--lr", type=float, help="0.1 for each 256 images of a batch")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=12, help="processes that read images, for each card")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def loaders(options: argparse.Namespace, world: int, rank: int) -> tuple[DataLoader[Any], DataLoader[Any], int]:
    """Training and validation batches of this process, and the number of classes."""
    ready = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    size = options.size
    train = datasets.ImageFolder(
        options.data / "train", v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *ready])
    )
    held_out = datasets.ImageFolder(
        options.data / "val", v2.Compose([v2.Resize(round(size / 0.875)), v2.CenterCrop(size), *ready])
    )
    if train.classes != held_out.classes:
        raise SystemExit(f"{options.data}: train/ and val/ do not have the same classes")
    own, rest = divmod(options.batch, world)
    if rest or not 0 < options.batch <= len(train):
        raise SystemExit(f"--batch {options.batch} is not one of {len(train)} images for {world} processes to share")
    shared: dict[str, Any] = {
        "batch_size": own,
        "num_workers": options.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    shuffled = DistributedSampler(train, world, rank, seed=options.seed, drop_last=True)
    ordered = range(rank, len(held_out), world)  # a sampler of torch's would repeat some images
    return (
        DataLoader(train, sampler=shuffled, drop_last=True, persistent_workers=options.workers > 0, **shared),
        DataLoader(held_out, sampler=list(ordered), **shared),
        len(train.classes),
    )


def rate(step: int, *, warmup: int, steps: int) -> float:
    """A line up to 1, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """No weight decay on norms and biases, as in the literature's setting."""
    few = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": few, "weight_decay": 0.0}]


def autocast(device: torch.device) -> Any:
    """bf16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def placed(batches: Iterator[Any] | DataLoader[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device, channels innermost; none of these waits for another."""
    for x, y in batches:
        x = x.to(device, non_blocking=True).to(memory_format=torch.channels_last)
        yield x, y.to(device, non_blocking=True)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Over the images of all processes."""
    model.eval()
    counts = torch.zeros(2, device=device, dtype=torch.float64)
    for x, y in placed(loader, device):
        with autocast(device):
            right = (model(x).argmax(1) == y).sum()
        counts += torch.stack([right, right.new_tensor(len(y))])
    model.train()
    if dist.is_initialized():
        dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def train(options: argparse.Namespace, device: torch.device, world: int, rank: int) -> dict[str, Any]:
    """All epochs, the final mask, and what it reaches."""
    batches, held_out, classes = loaders(options, world, rank)
    torch.manual_seed(options.seed)
    model = models.get_model(options.network, num_classes=classes).to(device, memory_format=torch.channels_last)
    steps = options.epochs * len(batches)
    lr = options.lr or 0.1 * options.batch / 256
    base = torch.optim.SGD(parameter_groups(model), lr=lr, momentum=0.9, weight_decay=options.weight_decay)
    make = mm.methods.get(options.method)
    method = make(**options.options) if options.method == "dense" else make(options.sparsity, **options.options)
    first = [next(iter(placed(batches, device)))] if method.reads_data else None
    optimizer = mm.sparsify(model, base, method, steps=steps, batches=first)
    warmup = options.warmup * optimizer.round_steps // options.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, warmup=warmup, steps=optimizer.round_steps)
    )
    whole: nn.Module = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    checkpoint, done = options.out / "checkpoint.pt", 0
    if checkpoint.exists():
        held = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        schedule.load_state_dict(held["schedule"])
        done = held["epochs"]
    start = time.monotonic()
    for epoch in range(done, options.epochs):
        batches.sampler.set_epoch(epoch)
        right = torch.zeros((), device=device, dtype=torch.float64)
        for x, y in placed(batches, device):
            with autocast(device):
                scores = whole(x)
                loss = nn.functional.cross_entropy(scores, y, label_smoothing=options.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += (scores.argmax(1) == y).sum()
        if dist.is_initialized():
            dist.all_reduce(right)
        optimizer.epoch_end(score=float(right) / (len(batches) * options.batch))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        if rank == 0:
            torch.save({**state, "epochs": epoch + 1}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        reached = accuracy(model, held_out, device)
        if rank == 0:
            spent = time.monotonic() - start
            print(f"epoch {epoch + 1}: loss {float(loss):.3f}, {100 * reached:.2f}%, {spent:.0f} s", flush=True)
    optimizer.finalize()
    if options.method != "dense":
        few = max(STATISTICS // options.batch, 1)
        mm.recalibrate(model, (x for (x, _), _ in zip(placed(batches, device), range(few), strict=False)))
        if dist.is_initialized():  # each process has seen other images
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer.div_(world))
    counted = mm.sparsity(model)
    result = {"method": options.method, "sparsity": options.sparsity, "seed": options.seed, "epochs": options.epochs}
    result |= {"accuracy": accuracy(model, held_out, device), "nonzeros": counted.nonzeros, "numel": counted.numel}
    if rank == 0:
        mm.save(model, options.out / "model.safetensors")
        (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """Train, as one of the processes that torchrun has started or alone."""
    options = parse()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    options.out.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.init_process_group("nccl" if gpu else "gloo")
    try:
        result = train(options, device, world, rank)
        if rank == 0:
            print(json.dumps(result))
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
