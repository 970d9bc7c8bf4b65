"""The error of fp16 plans and of PyTorch's bf16 against fp32, on a processor with or without AVX512-FP16.

    python benchmarks/runtime_half.py --networks resnet20-b1 mlp-b1

Without it the same plans run emulated: each operation in 32 bits, rounded to 16 as the real instruction would. It says
nothing about speed, which is not printed. An error is the largest difference over the largest element of the output.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch

import mirrormask as mm
from mirrormask.machine.targets import EMULATED_FP16, fp16_target
from networks import NETWORKS, build


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.98])
    options = parser.parse_args()
    target = fp16_target() or EMULATED_FP16
    print(f"{target.name}\n{'network':<14}{'sparsity':>9}{'fp16':>10}{'bf16':>10}{'ratio':>8}  layers in fp32")
    for name in options.networks:
        for sparsity in options.sparsities:
            model, x = build(NETWORKS[name], sparsity)
            expected = model(x)
            with mock.patch("mirrormask.runtime.build.fp16_target", lambda: target):
                report = mm.compile(model, x, precision="fp16", tune=False, force=True).report
            wide = ", ".join(layer for layer, _ in report.wide) or "none"
            brain = model.bfloat16()(x.bfloat16()).float()
            error = float((brain - expected).abs().max() / expected.abs().max())
            note = "" if report.precision == "fp16" else f" ({report.precision}: {report.reason})"
            print(
                f"{name:<14}{sparsity:>9}{report.error:>10.1e}{error:>10.1e}{report.error / error:>8.2f}  {wide}{note}"
            )


if __name__ == "__main__":
    main()
