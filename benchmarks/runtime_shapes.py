"""What a call of a new shape costs a compiled model: other lengths, batches and image sizes, and the memory they leave.

    python benchmarks/runtime_shapes.py --tokens bert --lengths 1000 --images resnet18 --sizes 20

Each shape is called twice; the difference is what was made for it: a capture, a plan, a prepared call. Seconds are
those of this process alone. Memory is what the process holds more than after the first tenth of the shapes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mirrormask as mm
from zoo import status_bytes
from zoo_networks import ZOO, build

#: The length of the sequences that a network for text is compiled for.
FIRST = 128


def costs(fast: nn.Module, inputs: list[Callable[[], Tensor]]) -> tuple[list[float], int]:
    """Seconds that each first call took beyond the second, and the bytes that were kept."""
    found, before = [], 0
    for number, make in enumerate(inputs):
        x = make()
        seconds = []
        for _ in range(2):
            start = time.process_time()
            fast(x)
            seconds.append(time.process_time() - start)
        found.append(max(0.0, seconds[0] - seconds[1]))
        if number == len(inputs) // 10:
            before = status_bytes("VmRSS")
    return found, status_bytes("VmRSS") - before


def measure(what: str, name: str, fast: nn.Module, inputs: list[Callable[[], Tensor]], most: float) -> None:
    found, kept = costs(fast, inputs)
    late = sorted(found)
    over = sum(seconds > most for seconds in found)
    plans = sum(len(region.plans()) for region in fast.regions) if isinstance(fast, mm.runtime.CompiledModel) else 0
    print(
        f"{name}, {len(inputs)} {what}: median {1e3 * statistics.median(found):.2f} ms, 99% below "
        f"{1e3 * late[int(0.99 * (len(late) - 1))]:.1f} ms, worst {1e3 * late[-1]:.0f} ms, {over} above "
        f"{1e3 * most:.0f} ms; {plans} plans; {kept / 1e6:.1f} MB kept after the first tenth",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", default=["bert"], choices=[n for n, z in ZOO.items() if z.tokens])
    parser.add_argument("--images", nargs="*", default=["resnet18"], choices=list(ZOO))
    parser.add_argument("--lengths", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest sequence")
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    order = random.Random(0)
    with torch.no_grad():
        for name in options.tokens:
            model, _ = build(ZOO[name], options.sparsity, 1000)
            fast = mm.compile(model, torch.randint(1000, (1, FIRST)), tune=False, force=True)
            shapes = [(order.randint(1, 4), order.randint(2, options.longest)) for _ in range(options.lengths)]
            measure("lengths", name, fast, [lambda s=s: torch.randint(1000, s) for s in shapes], 0.01)
        for name in options.images:
            model, _ = build(ZOO[name], options.sparsity, 1000)
            fast = mm.compile(model, torch.randn(1, 3, 224, 224), tune=False, force=True)
            sides = [32 * order.randint(2, 9) for _ in range(2 * options.sizes)]
            sizes = [(1, 3, *sides[2 * i : 2 * i + 2]) for i in range(options.sizes)]
            measure("image sizes", name, fast, [lambda s=s: torch.randn(s) for s in sizes], 1.0)


if __name__ == "__main__":
    main()
