"""Linear layers at batch 1 with weights of 8 and 16 bits: over the best dense engine, and over weights of 32 bits.

    OMP_NUM_THREADS=1 python benchmarks/narrow_weights.py          # the table of docs/deploy.md

Ratios within one process, in its processor time: medians of rounds, in which the compiled models and the dense engines
in fp32 take turns.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import torch
from torch import nn

import mirrormask as mm
from mirrormask.machine.cache import processor_name
from networks import Network, build, mlp
from turns import ENGINES, race

KINDS = ("fp32", "int8", "fp16")
SPARSITIES = (0.9, 0.95, 0.98)


def wide_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


def transformer_linears() -> nn.Sequential:
    pairs = [(nn.Linear(384, 1536), nn.ReLU(), nn.Linear(1536, 384)) for _ in range(6)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair])


#: Zeros in every layer, as a random mask gives them.
NETWORKS = {
    "MLP 784-1024-1024-10": Network(mlp, (1, 784), keep_first=False, keep_last=False),
    "MLP 784-4096-4096-10": Network(wide_mlp, (1, 784), keep_first=False, keep_last=False),
    "twelve transformer linears, one token": Network(transformer_linears, (1, 384), keep_first=False, keep_last=False),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{processor_name()}, one thread\n")
    print("| network | zeros | best dense fp32 engine | fp32 | int8 | fp16 | int8 over fp32 | fp16 over fp32 |")
    print("|---|---|---|---|---|---|---|---|")
    unmeasured: dict[str, str] = {}
    for name, network in NETWORKS.items():
        dense, x = build(network, 0.0)
        ours = {}
        for sparsity in SPARSITIES:
            model, _ = build(network, sparsity)
            for kind in KINDS:
                ours[f"{sparsity} {kind}"] = functools.partial(mm.compile(model, x, weights=kind, force=True), x)
        turns, missing = race(dense, x, ours, threads=1, engines=ENGINES, rounds=rounds, clock="processor")
        seconds = {key: statistics.median(times) for key, times in turns.items()}
        best = min((key for key in ENGINES if key in seconds), key=lambda key: seconds[key])
        for sparsity in SPARSITIES:
            own = [seconds[f"{sparsity} {kind}"] for kind in KINDS]
            cells = [f"{1e3 * s:.3g} ms, {seconds[best] / s:.2f}" for s in own]
            wide = turns[f"{sparsity} fp32"]
            over = [
                statistics.median(a / b for a, b in zip(wide, turns[f"{sparsity} {kind}"], strict=True))
                for kind in KINDS[1:]
            ]
            row = [name, f"{sparsity:.0%}", f"{best} {1e3 * seconds[best]:.3g} ms", *cells, *(f"{r:.2f}" for r in over)]
            print("| " + " | ".join(row) + " |", flush=True)
        unmeasured |= missing
    for engine, why in unmeasured.items():
        print(f"{engine} not measured: {why}")


if __name__ == "__main__":
    main()
