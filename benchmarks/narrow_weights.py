"""Linear layers at batch 1 with weights of 8 and 16 bits, against weights of 32 bits: the table of docs/deploy.md.

    OMP_NUM_THREADS=1 python benchmarks/narrow_weights.py

Ratios within one process, in its processor time: medians of paired rounds, in which the engines take turns.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import mirrormask as mm

ROUNDS, CALLS = 41, 20


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


def transformer_linears() -> nn.Sequential:
    pairs = [(nn.Linear(384, 1536), nn.ReLU(), nn.Linear(1536, 384)) for _ in range(6)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair])


def seconds(call: nn.Module, x: torch.Tensor) -> float:
    call(x)
    start = time.process_time()
    for _ in range(CALLS):
        call(x)
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print("| network | zeros | int8 over fp32 weights | fp16 over fp32 weights |\n|---|---|---|---|")
    for name, make, features in (("MLP", mlp, 784), ("transformer linears", transformer_linears, 384)):
        for sparsity in (0.9, 0.95, 0.98):
            torch.manual_seed(0)
            model, x = make().eval(), torch.randn(1, features)
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.data *= torch.rand_like(weight) >= sparsity
            kinds = ("fp32", "int8", "fp16")
            engines = {kind: mm.compile(model, x, weights=kind, force=True) for kind in kinds}
            rounds = [{kind: seconds(fast, x) for kind, fast in engines.items()} for _ in range(ROUNDS)]
            ratios = [statistics.median(row["fp32"] / row[kind] for row in rounds) for kind in ("int8", "fp16")]
            print(f"| {name} | {sparsity:.0%} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
