"""How long ``mirrormask.runtime.load`` takes for ResNet-18, in fresh processes without torch (docs/deploy.md).

    python benchmarks/cold_start.py                # kernels guessed or chosen before: tune=False
    python benchmarks/cold_start.py --tuned        # as on another processor: the kernels are measured at the first load

Seconds of processor time, and of the clock in brackets: the fastest and the median of the processes. The first one,
with an empty cache, makes the machine code too; it is apart. The processes import the files of mirrormask-runtime
alone, compiled beforehand as pip does.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import mirrormask as mm
from networks import NETWORKS, build

ROOT = Path(__file__).parent.parent
CHILD = """
import json, sys, time

def now():
    return time.process_time(), time.perf_counter()

start = now()
import numpy as np
import mirrormask.runtime as runtime
imported = now()
model = runtime.load(sys.argv[1], tune=sys.argv[2] == "tuned", threads=1)
loaded = now()
model(np.zeros((1, 3, 224, 224), np.float32))
times = [start, imported, loaded, now()]
assert "torch" not in sys.modules
print(json.dumps([[b - a for a, b in zip(one, other)] for one, other in zip(times, times[1:])]))
"""


def files(folder: Path) -> None:
    """The files of mirrormask-runtime, compiled."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    settings = tomllib.loads((ROOT / "packaging" / "runtime" / "pyproject.toml").read_text())
    for source, target in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        found, place = (ROOT / "packaging" / "runtime" / source).resolve(), folder / target
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if found.is_dir() else shutil.copy)(found, place)
    compileall.compile_dir(folder, quiet=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--processes", type=int, default=9)
    parser.add_argument("--tuned", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MIRRORMASK_CACHE"] = str(folder / "building")
        files(folder / "runtime")
        model, x = build(NETWORKS["resnet18-b1"], asked.sparsity)
        fast = mm.compile(model, x, tune=False, force=True)
        with contextlib.ExitStack() as stack:
            if asked.tuned:
                stack.enter_context(mock.patch("mirrormask.runtime.model.save.processor", lambda: "another"))
            fast.save(folder / "m.mirror")
        rows = []
        for number in range(asked.processes + 1):
            cache = folder / "cache"
            if asked.tuned and number:  # the code is there, and what tuning found is not
                cache = folder / f"cache{number}"
                shutil.copytree(folder / "cache", cache, ignore=shutil.ignore_patterns("*.json"))
            environment = {**os.environ, "PYTHONPATH": str(folder / "runtime"), "MIRRORMASK_CACHE": str(cache)}
            command = [sys.executable, "-c", CHILD, str(folder / "m.mirror"), "tuned" if asked.tuned else ""]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            rows.append(json.loads(done.stdout))
        print(f"{(folder / 'm.mirror').stat().st_size:,} bytes; {len(rows) - 1} processes after the first")
        print("| | fastest | median | the first |\n|---|---|---|---|")
        for part, what in enumerate(("importing", "loading", "the first answer")):
            fresh = [row[part] for row in rows[1:]]
            cells = [[choose(row[k] for row in fresh) for k in (0, 1)] for choose in (min, statistics.median)]
            print(f"| {what} | " + " | ".join(f"{a:.2f} s ({b:.2f})" for a, b in (*cells, rows[0][part])) + " |")
        whole = [[sum(part[k] for part in row) for k in (0, 1)] for row in rows[1:]]
        cells = [[choose(row[k] for row in whole) for k in (0, 1)] for choose in (min, statistics.median)]
        first = [sum(part[k] for part in rows[0]) for k in (0, 1)]
        print("| all | " + " | ".join(f"{a:.2f} s ({b:.2f})" for a, b in (*cells, first)) + " |")


if __name__ == "__main__":
    main()
