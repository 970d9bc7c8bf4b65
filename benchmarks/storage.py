"""How small, and how fast: mm.save and mm.load on ResNet-18 against torch.save and safetensors.

    python benchmarks/storage.py [--folder FOLDER] [--repeats 7] [--out results.json]
    python benchmarks/storage.py --sizes         # bytes alone, beside zstd -19 of the dense file
    python benchmarks/storage.py --memory        # the peak while loading one large tensor

Every row is one sparsity (random positions, float32; one row has a 2:4 pattern). Rates are megabytes of *dense* weights
a second: the median of interleaved repeats after a warm-up, with the range. Writing includes the fsync, which mm.save
does and the other two do not; "no fsync" is the same without it, to tell the library's work from the disk's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mirrormask as mm

#: sparsity -> the share of the dense file that the file may have, at most.
BARS = {0.90: 1 / 6, 0.95: 1 / 12, 0.98: 1 / 25}
#: Megabytes of dense weights a second, both ways.
RATE_BAR = 300.0


def resnet18_state(sparsity: float, two_four: bool = False) -> dict[str, Tensor]:
    """The tensors of torchvision's ResNet-18, its convolutions and its classifier with random zeros."""
    from torchvision.models import resnet18

    model = resnet18()
    with torch.no_grad():
        for weight in mm.select_weights(model).values():
            if two_four and weight[0].numel() % 4 == 0:
                keep = torch.rand(weight.numel() // 4, 4).argsort(-1) < 2
                weight.mul_(keep.reshape(weight.shape)).add_(0.0)
            else:
                weight.mul_(torch.rand_like(weight) >= sparsity).add_(0.0)
    return dict(model.state_dict())


@contextlib.contextmanager
def no_fsync() -> Iterator[None]:
    with mock.patch("os.fsync", lambda descriptor: None):
        yield


def save_without_fsync(state: dict[str, Tensor], path: Path) -> None:
    with no_fsync():
        mm.save(state, path)


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "mm": mm.save,
    "mm, no fsync": save_without_fsync,
    "safetensors": lambda state, path: save_file(state, path),
    "torch": lambda state, path: torch.save(state, path),
}
READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "mm": mm.load,
    "mm, no fsync": mm.load,
    "safetensors": load_file,
    "torch": lambda path: torch.load(path, weights_only=True),
}


#: sparsity -> how many times smaller than the dense float32 file one of 8-bit values is to be.
INT8_BARS = {0.90: 25, 0.95: 45, 0.98: 90}
#: The share of zstd's file that ours is to have at most.
ZSTD_BAR = 0.95


def pruned_resnet18(sparsity: float, magnitude: bool) -> torch.nn.Module:
    """Zeros at random, or where weights are small in all layers together, as pruning leaves them."""
    from torchvision.models import resnet18

    model = resnet18()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2.0)
        weights = list(mm.select_weights(model).values())
        scores = [weight.abs() if magnitude else torch.rand_like(weight) for weight in weights]
        for weight, mask in zip(weights, mm.masks.select(scores, sparsity), strict=True):
            weight.mul_(mask).add_(0.0)  # no -0.0, which only the rival would pay for
    return model


def size_table() -> None:
    """A table of bytes; what misses its bar is marked."""
    import zstandard
    from safetensors.torch import save

    print("| zeros | float32 | times smaller | of zstd -19 | float16 | int8 | times smaller |")
    print("|---|---|---|---|---|---|---|")
    for magnitude in (False, True):
        for sparsity, bar in INT8_BARS.items():
            torch.manual_seed(0)
            model = pruned_resnet18(sparsity, magnitude)
            dense = sum(tensor.nbytes for tensor in model.state_dict().values())
            full, half, levels = (int(mm.predict_size(model, values=v)) for v in (None, "float16", "int8"))
            rival = len(zstandard.ZstdCompressor(level=19).compress(save(model.state_dict())))
            marks = ["" if full <= ZSTD_BAR * rival else " (missed)", "" if dense >= bar * levels else " (missed)"]
            print(
                f"| {100 * sparsity:g}%, {'the smallest' if magnitude else 'random'} | {full:,} | {dense / full:.1f} "
                f"| {full / rival:.3f}{marks[0]} | {half:,} | {levels:,} | {dense / levels:.1f}{marks[1]} |",
                flush=True,
            )


def measure(state: dict[str, Tensor], folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Sizes in bytes and seconds of writing and reading, by writer."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in WRITERS}
    sizes = {}
    for repeat in range(repeats + 1):
        for name in WRITERS:
            path = folder / name.replace(", ", "-")
            path.unlink(missing_ok=True)
            start = time.perf_counter()
            WRITERS[name](state, path)
            written = time.perf_counter()
            loaded = READERS[name](path)
            read = time.perf_counter()
            if repeat == 0:  # the warm-up, where the result is checked too
                assert all(torch.equal(loaded[key], state[key]) for key in state)
                sizes[name] = path.stat().st_size
            else:
                seconds[name]["write"].append(written - start)
                seconds[name]["read"].append(read - written)
    rows = {}
    for name, both in seconds.items():
        rows[name] = {"bytes": float(sizes[name])}
        for way, times in both.items():
            rows[name][way] = statistics.median(times)
            rows[name][way + "_fastest"], rows[name][way + "_slowest"] = min(times), max(times)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of mm.load instead")
    parser.add_argument("--sizes", action="store_true", help="print sizes beside zstd's instead")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.sizes:
        size_table()
        return
    if arguments.memory:
        memory(arguments.folder)
        return
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{processor()}; {os.cpu_count()} cores, 1 thread; {versions}")
    print(f"{'case':<10}{'writer':<14}{'bytes':>12}{'share':>9}{'times':>8}  {'write MB/s':<20}{'read MB/s':<20}")
    results, losses = {}, []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for sparsity in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, "2:4"):
            two_four = sparsity == "2:4"
            state = resnet18_state(0.5 if two_four else float(sparsity), two_four)
            dense = sum(tensor.nbytes for tensor in state.values())
            case = "2:4" if two_four else f"{100 * float(sparsity):g}%"
            results[case] = measure(state, Path(folder), arguments.repeats)
            for name, row in results[case].items():
                share = row["bytes"] / dense
                rates = [rate(dense, row, way) for way in ("write", "read")]
                sizes = f"{row['bytes']:>12,.0f}{share:>9.4f}{1 / share:>8.2f}"
                print(f"{case:<10}{name:<14}{sizes}  {rates[0]:<20}{rates[1]:<20}")
            own = results[case]["mm"]
            if not two_four and own["bytes"] > BARS.get(float(sparsity), 2.0) * dense:
                losses.append(f"{case}: larger than its bar")
            losses += [
                f"{case}: {way} at {dense / own[way] / 1e6:.0f} MB/s, below {RATE_BAR:.0f}"
                for way in ("write", "read")
                if dense / own[way] / 1e6 < RATE_BAR
            ]
            losses += [
                f"{case}: {way} {own[way] / row[way]:.1f} times as long as {name}"
                for name, row in results[case].items()
                for way in ("write", "read")
                if name in ("safetensors", "torch") and own[way] > row[way]
            ]
    print("where it loses:", *(losses or ["nowhere"]), sep="\n  ")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


#: Loads a file in a process of its own; prints how far the peak of its resident memory rose, in bytes (Linux).
LOADER = """
import re, sys, torch, mirrormask as mm

def resident(field):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", status.read())[1])

mm.load(sys.argv[1])
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak starts again from here
before = resident("VmRSS")
state = mm.load(sys.argv[2])
print(resident("VmHWM") - before)
"""


def memory(folder: Path | None) -> None:
    """The peak while loading one tensor of 256 MB, over the dense tensor's bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        small, large = Path(inside) / "small", Path(inside) / "large"
        mm.save({"w": torch.eye(300), "b": torch.ones(3)}, small)  # imports and first calls are not the file's
        for sparsity in (0.0, 0.5, 0.9, 0.98):
            weight = torch.randn(8192, 8192).mul_(torch.rand(8192, 8192) >= sparsity).add_(0.0)
            mm.save({"w": weight}, large)
            command = [sys.executable, "-c", LOADER, str(small), str(large)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            extra = int(done.stdout) / weight.nbytes
            print(f"{100 * sparsity:g}%: the peak rises by {extra:.3f} of the dense tensor's bytes")


def rate(dense: int, row: dict[str, float], way: str) -> str:
    middle, low, high = (dense / row[key] / 1e6 for key in (way, way + "_slowest", way + "_fastest"))
    return f"{middle:.0f} ({low:.0f}..{high:.0f})"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
