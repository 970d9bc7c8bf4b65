"""The commands behind the tables of docs/ can be started: what they import is there."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_every_benchmark_finds_what_it_imports():
    names = [path.stem for path in sorted(BENCHMARKS.glob("*.py"))]
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_examples_of_the_runtimes_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    failed, tried = doctest.testmod(importlib.import_module("runtime"))
    assert tried and not failed
