"""Everything that needs a GPU, in one command sized for eight minutes of one card; see docs/results.md.

    python benchmarks/gpu.py --pack /data/cifar10 --data cifar10.npz     # once, where the folder of images is: 20 MB
    python benchmarks/gpu.py --data cifar10.npz --json $OUT/gpu.jsonl    # on the machine with the GPU
    python benchmarks/gpu.py --table                                     # what the results say, in Markdown
    python benchmarks/gpu.py --device cpu --tiny                         # that all of it runs; measures nothing

Three parts: (a) the tests marked `cuda`; (b) time and memory of a step, see gpu_step.py; (c) trainings on CIFAR-10, see
gpu_accuracy.py, some side by side, one after another until the time is over. What is done is a line of JSON, written
at once; what benchmarks/gpu.jsonl holds of the same card is not done again, so that a second lease goes on
where the first one ended: copy the lines there. It needs PyTorch, NumPy, safetensors, Pillow, pytest and llvmlite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import gpu_data
import gpu_step

HERE = Path(__file__).parent
KEPT = HERE / "gpu.jsonl"
#: Settings of methods, as on ResNet-20 before (recipes/compare-cifar10-resnet20.yaml); mirror as it is.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mirror": {},
    "gmp": {},
    "gmp_ham": {"a": 100.0},
    "acdc_ham": {"allocation": "erk"},
    "str": {"init_threshold": 0.001},
    "pilot": {"alpha_init": 0.0003},
}
SPARSITIES = (0.98, 0.95, 0.99)
#: Shares of the time that tests and steps may take; the trainings have the rest.
TESTS, STEPS = 0.2, 0.25
#: What tells one result from another.
KEY = ("part", "card", "network", "contender", "shape", "method", "sparsity", "seed", "epochs")


def queue(epochs: int, networks: tuple[str, ...], seeds: int) -> Iterator[dict[str, Any]]:
    """The trainings in the order of their worth: a whole comparison at one sparsity, then the next."""
    for seed, network, sparsity in itertools.product(range(seeds), networks, SPARSITIES):
        for method, options in METHODS.items():
            if method != "dense" or sparsity == SPARSITIES[0]:  # a dense network is the same at each
                level = 0.0 if method == "dense" else sparsity
                run = {"network": network, "method": method, "options": options, "sparsity": level}
                yield {**run, "seed": seed, "epochs": epochs}


class Results:
    """The lines that there are, and the file that takes new ones."""

    def __init__(self, path: Path, card: str) -> None:
        self.path, self.card = path, card
        lines = [line for file in {path, KEPT} if file.exists() for line in file.read_text().splitlines()]
        # Tests that failed are run again.
        self.known = {key(row) for row in map(json.loads, lines) if not row.get("returncode")}

    def has(self, part: str, row: dict[str, Any]) -> bool:
        return key({"part": part, "card": self.card, **row}) in self.known

    def add(self, part: str, row: dict[str, Any]) -> None:
        line = {"part": part, "card": self.card, "torch": torch.__version__, **row}
        self.known.add(key(line))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def key(line: dict[str, Any]) -> str:
    """What a result is of."""
    return json.dumps([line.get(name) for name in KEY])


def environment() -> dict[str, str]:
    """Ours, with the package and its tests importable from the tree."""
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_tests(results: Results, device: str, seconds: float, *, tiny: bool) -> None:
    """Part (a)."""
    if results.has("tests", {}):
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--maxfail=10",
        "-m",
        "cuda or not cuda",
        "-o",
        "addopts=",
    ]
    command += ["-p", "no:cacheprovider", str(HERE.parent / "tests" / "cuda"), *(["-k", "tiny"] if tiny else [])]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env={**environment(), "MIRRORMASK_TEST_DEVICE": device},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        code, last = done.returncode, (done.stdout + done.stderr).splitlines()[-25:]
    except subprocess.TimeoutExpired as error:
        code, last = (
            -1,
            [f"not finished in {seconds:.0f} s", *(error.stdout or b"").decode(errors="replace").splitlines()[-5:]],
        )
    results.add(
        "tests", {"returncode": code, "seconds": round(time.monotonic() - start), "last": last if code else last[-1:]}
    )


def run_steps(results: Results, device: str, end: float, *, tiny: bool) -> None:
    """Part (b)."""
    for network in gpu_step.cases(tiny=tiny):
        if time.monotonic() < end and not results.has("step", {"network": network, "contender": "torch"}):
            for row in gpu_step.measure(network, torch.device(device), tiny=tiny):
                results.add("step", row)
    for row in gpu_step.semi_structured(torch.device(device), tiny=tiny):
        if not results.has("2:4", row):
            results.add("2:4", row)


def run_trainings(results: Results, options: argparse.Namespace, end: float) -> None:
    """Part (c): some processes side by side; what is not finished at the end counts as not measured."""
    networks, seeds = (("resnet20",), 1) if options.tiny else (("resnet20", "resnet18"), 5)
    todo = [run for run in queue(options.epochs, networks, seeds) if not results.has("accuracy", run)]
    todo = todo[1:2] if options.tiny else todo  # the first sparse one
    running: list[subprocess.Popen[str]] = []
    command = [sys.executable, str(HERE / "gpu_accuracy.py"), "--device", options.device]
    if options.data:  # decoded once, and not by each of them
        decoded = Path(tempfile.mkdtemp(prefix="mirrormask-gpu-")) / "images.npz"
        gpu_data.unpack(options.data, decoded)
        command += ["--data", str(decoded)]
    else:
        command += ["--batch", "8"]
    longest = 0.0
    try:
        while (todo or running) and time.monotonic() < end:
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                out, error = process.communicate()
                if process.returncode:
                    print(f"a training failed: {error.splitlines()[-3:]}", flush=True)
                else:
                    row = json.loads(out.splitlines()[-1])
                    longest = max(longest, row["seconds"])
                    results.add("accuracy", row)
            if todo and len(running) < options.workers and time.monotonic() + longest < end:
                pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
                running.append(subprocess.Popen([*command, json.dumps(todo.pop(0))], env=environment(), **pipes))
            elif not running:
                break  # none that would end in time
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    print(f"{len(running)} trainings cut off, {len(todo)} not begun", flush=True)


def table(path: Path) -> str:
    """The results in Markdown."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not lines:
        return "Nothing was measured on a GPU yet."
    out = []
    for card in dict.fromkeys(line["card"] for line in lines):
        own = [line for line in lines if line["card"] == card]
        out.append(f"{card}, PyTorch {own[0]['torch']}:")
        steps = [line for line in own if line["part"] == "step"]
        if steps:
            out.append(
                "| | step, ms | of torch's | optimizer alone | more tensors like the weights |\n|---|---|---|---|---|"
            )
            cells = "| {network}, {contender} | {ms:.1f} | {whole_ratio:.3f} | {optimizer_ratio:.2f} "
            cells += "| {extra_tensors:.2f} |"
            out[-1] += "".join("\n" + cells.format(**line) for line in steps)
        runs = [line for line in own if line["part"] == "accuracy"]
        for network in dict.fromkeys(line["network"] for line in runs):
            levels = sorted({line["sparsity"] for line in runs if line["sparsity"]})
            rows = [
                f"| {network} | " + " | ".join(f"{100 * s:g}%" for s in levels) + " | seeds |",
                "|---" * (len(levels) + 2) + "|",
            ]
            for method in dict.fromkeys(line["method"] for line in runs if line["network"] == network):
                some = [r for r in runs if r["network"] == network and r["method"] == method]
                found = [[r["test_accuracy"] for r in some if r["sparsity"] in (s, 0.0)] for s in levels]
                means = " | ".join(f"{100 * sum(v) / len(v):.2f}" if v else "-" for v in found)
                rows.append(f"| {method} | {means} | {len({r['seed'] for r in some})} |")
            out.append("\n".join(rows))
    return "\n\n".join(out)


def main() -> None:
    """Pack, measure or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="a folder of images, train/CLASS and test/CLASS, to pack into --data")
    parser.add_argument("--data", type=Path, help="the packed images")
    parser.add_argument("--json", type=Path, default=KEPT, help="the file that takes the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few steps of each, on images of nothing")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all of it")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--workers", type=int, default=6, help="trainings side by side")
    parser.add_argument("--parts", default="tests,step,accuracy")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(options.json))
        return
    if options.pack:
        gpu_data.pack(options.pack, options.data)
        print(f"{options.data}: {options.data.stat().st_size / 1e6:.1f} MB")
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --tiny tries the script itself")
    if not options.tiny and (options.data is None or not options.data.exists()):
        parser.error("give the packed images with --data FILE (--pack makes them), or --tiny")
    start, options.epochs = time.monotonic(), 1 if options.tiny else options.epochs
    card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu (tiny: not a measurement)"
    results, parts = Results(options.json, card), options.parts.split(",")
    if "tests" in parts:
        run_tests(results, options.device, 600.0 if options.tiny else TESTS * options.seconds, tiny=options.tiny)
    if "step" in parts:
        run_steps(results, options.device, start + (TESTS + STEPS) * options.seconds, tiny=options.tiny)
    if "accuracy" in parts:
        run_trainings(results, options, start + options.seconds)
    print(table(options.json))


if __name__ == "__main__":
    main()
