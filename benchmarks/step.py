"""The time of a training step: dense, the product in the graph, and SparseOptimizer.

    python benchmarks/step.py [--network mlp resnet20 resnet18] [--rounds 15] [--threads N] [--out docs/data/step.json]
    python benchmarks/step.py --network resnet20 --contenders all     # every method

In every round each contender takes a few steps in turn (interleaved, so that a drift of the machine meets all of
them); the table gives medians over the rounds, and the ratio to dense in brackets. Changes of the mask are rare (every
two hundredth step, say): one is timed apart, and its share a step, over a training of 10000 steps, is added. "Of
parts" is the whole step's ratio with forward and backward taken as those of dense: the model is an ordinary one under
every method but parametrize, so what they differ by is the machine's noise, on a busy one more than the optimizer. Peak
memory is the growth of the process's resident set over the model, by five steps and their gradients, each contender in
a process of its own, in which a dense step was taken before: the first one of a process imports 150 MB of torch. The
fused step's code comes from the cache: making it, once a machine, takes 75 MB for LLVM.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

import mirrormask as mm
from mirrormask.geometry import factorize
from mirrormask.progress import Clock

#: The length of the training that schedules are set to: no mask changes while steps are timed.
STEPS = 10_000
BATCH = {"mlp": (128, (784,)), "resnet20": (128, (3, 32, 32)), "resnet18": (32, (3, 32, 32))}


class Product(nn.Module):
    """``m * w`` in the graph."""

    def forward(self, m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The weight."""
        return m * w

    def right_inverse(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """PILoT's initialisation."""
        return factorize(x, 1.0)


def network(name: str) -> nn.Module:
    """One of the benchmark's networks."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    from mirrormask.train.models import build

    return build({"resnet20": "resnet20", "resnet18": "resnet18-cifar"}[name], (3, 32, 32), 10)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)


def contender(name: str, model: nn.Module, network_name: str) -> torch.optim.Optimizer:
    """The optimizer of one contender, with ``model`` prepared for it."""
    if name == "dense":
        return sgd(model)
    if name == "parametrize":
        for module in list(model.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                parametrize.register_parametrization(module, "weight", Product())
        return sgd(model)
    name, _, path = name.partition("/")
    name = "dense" if name == "wrapped" else name
    options = {"factors": False} if path.startswith("descent") else {}
    method = mm.methods.get(name)(0.0 if name == "dense" else 0.95, **options)
    data = {"batches": [batch(network_name, 16)]} if method.reads_data else {}
    return mm.sparsify(model, sgd(model), method, steps=STEPS, fused=not path.endswith("foreach"), **data)


def batch(network_name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of noise, with labels."""
    return torch.randn(size, *BATCH[network_name][1]), torch.randint(0, 10, (size,))


def mask_ms(optimizer: torch.optim.Optimizer) -> float:
    """The milliseconds a step that changing the mask costs, over a whole training."""
    if not isinstance(optimizer, mm.SparseOptimizer):
        return 0.0
    rule = optimizer.method.mask
    clocks = [Clock(step, STEPS) for step in range(1, STEPS + 1)]
    pruned = sum(rule.sparsity_at(clock) is not None for clock in clocks)
    exchanged = sum(rule.regrow_at(clock) > 0 for clock in clocks)
    if not pruned + exchanged:
        return 0.0
    changes, clock = optimizer.parts.masks, Clock(optimizer.step_count, STEPS)
    start = time.perf_counter()
    if exchanged:
        changes.exchange(0.1, [x.grad for x in optimizer.weights.values()], clock)
    else:
        changes.prune(0.9 * rule.sparsity, clock)
    return 1e3 * (time.perf_counter() - start) * (pruned + exchanged) / STEPS


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> tuple[float, float]:
    """Take a step; returns the seconds of the whole and of the optimizer's part."""
    start = time.perf_counter()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    middle = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    return end - start, end - middle


def measure(name: str, contenders: list[str], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Medians in milliseconds of the whole step and of the optimizer's step, for each contender."""
    x, y = batch(name, BATCH[name][0])
    pairs = {}
    for label in contenders:
        model = network(name)
        pairs[label] = (model, contender(label, model, name))
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in contenders}
    for round_number in range(rounds + 1):
        for label, (model, optimizer) in pairs.items():
            taken = [one_step(model, optimizer, x, y) for _ in range(steps)]
            if round_number:  # the first round warms up
                times[label] += taken
    masks = {label: mask_ms(optimizer) for label, (_, optimizer) in pairs.items()}
    return {
        label: {
            "step_ms": 1e3 * statistics.median(whole for whole, _ in taken) + masks[label],
            "optimizer_ms": 1e3 * statistics.median(part for _, part in taken) + masks[label],
            "mask_ms": masks[label],
        }
        for label, taken in times.items()
    }


def peak_memory(name: str, label: str) -> float:
    """The peak growth of the resident set over five steps, in bytes per parameter of the plain model."""
    torch.set_num_threads(1)
    size, shape = 1, BATCH[name][1]
    model = network(name)
    parameters = sum(p.numel() for p in model.parameters())
    x, y = torch.randn(size * 2, *shape), torch.randint(0, 10, (size * 2,))
    stranger = network(name)
    one_step(stranger, sgd(stranger), x, y)  # what torch imports and keeps for any optimizer is no contender's
    del stranger
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _resident("VmRSS")
    optimizer = contender(label, model, name)
    for _ in range(5):
        one_step(model, optimizer, x, y)
    return (_resident("VmHWM") - before) / parameters


def trim() -> None:
    """Give memory that was freed back to the system: else a contender would find it there, and not grow."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def in_a_process(name: str, label: str) -> float:
    """Run :func:`peak_memory` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (name, label))


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["dense", "parametrize", "mirror/foreach", "mirror", "mirror/descent-foreach", "mirror/descent"],
        metavar="NAME",
        help="methods (NAME/foreach: without the fused step; mirror/descent: without factors), dense, "
        "wrapped (dense in the wrapper), parametrize; all",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps a contender takes in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    if arguments.contenders == ["all"]:
        arguments.contenders = ["dense", "wrapped", *(name for name in mm.methods.names() if name != "dense")]
    torch.set_num_threads(arguments.threads)
    print(f"{processor()}, {arguments.threads} threads, torch {torch.__version__}, Python {platform.python_version()}")
    print("medians; in brackets the ratio to dense SGD (torch's foreach)\n")
    results = {}
    for name in arguments.network:
        results[name] = measure(name, arguments.contenders, arguments.rounds, arguments.steps)
        dense = results[name]["dense"]
        print(
            f"{name}, batch {BATCH[name][0]}\n",
            f" {'':<16}{'whole step':>20}{'optimizer alone':>22}{'step, of parts':>16}",
            end="",
        )
        print(f"{'peak bytes/weight':>20}" if arguments.memory else "")
        for label, row in results[name].items():
            line = f"  {label:<16}"
            for key, width in (("step_ms", 20), ("optimizer_ms", 22)):
                line += f"{row[key]:.2f} ms ({row[key] / dense[key]:.2f})".rjust(width)
            row["step_ratio"] = 1 + (row["optimizer_ms"] - dense["optimizer_ms"]) / dense["step_ms"]
            line += f"{row['step_ratio']:.3f}".rjust(16) if label != "parametrize" else " " * 16
            if arguments.memory:
                row["peak_bytes_per_weight"] = in_a_process(name, label)
                line += f"{row['peak_bytes_per_weight']:.1f}".rjust(20)
            print(line, flush=True)
    if arguments.out:
        report = {
            "processor": processor(),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "results": results,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
