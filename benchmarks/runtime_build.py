"""How long ``mirrormask.compile`` takes in a fresh process: with an empty cache (capture, tuning), then from the cache.

    python benchmarks/runtime_build.py --networks resnet18-b1 --sparsities 0.95

``import torch`` and making the model are left out; everything that ``mirrormask.compile`` imports and does is counted.
Each figure is a process of its own; the cached one is the median of ``--rounds``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from networks import NETWORKS, build


def once(network: str, sparsity: float, threads: int) -> None:
    """In a process of its own: print the seconds that the build took, and whether it came from the cache."""
    torch.set_num_threads(threads)
    model, x = build(NETWORKS[network], sparsity)
    start = time.perf_counter()
    import mirrormask as mm

    fast = mm.compile(model, x)
    print(time.perf_counter() - start, int(fast.report.cached))


def child(folder: str, network: str, sparsity: float, threads: int) -> tuple[float, bool]:
    command = [sys.executable, __file__, "--once", network, str(sparsity), str(threads)]
    environment = {**os.environ, "MIRRORMASK_CACHE": folder}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, cached = result.stdout.split()
    return float(seconds), cached == "1"


def main() -> None:
    if "--once" in sys.argv:
        network, sparsity, threads = sys.argv[-3:]
        with torch.no_grad():
            once(network, float(sparsity), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.95])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for network in options.networks:
        for sparsity in options.sparsities:
            with tempfile.TemporaryDirectory() as folder:
                first, _ = child(folder, network, sparsity, options.threads)
                later = [child(folder, network, sparsity, options.threads) for _ in range(options.rounds)]
                megabytes = sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6
            assert all(cached for _, cached in later)
            median = statistics.median(seconds for seconds, _ in later)
            print(
                f"{network} at {sparsity:g}: built in {first:.2f} s, from the cache in {median:.2f} s "
                f"({min(later)[0]:.2f} to {max(later)[0]:.2f}); the cache holds {megabytes:.2f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
