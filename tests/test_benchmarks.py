"""The commands behind the tables of docs/ can be started: what they import is there."""

import doctest
import importlib
import sys
from pathlib import Path

from mirrormask.compare.runner import processes

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def imported():
    sys.path.insert(0, str(BENCHMARKS))
    for path in sorted(BENCHMARKS.glob("*.py")):
        importlib.import_module(path.stem)


def test_every_benchmark_finds_what_it_imports():
    process = processes().Process(target=imported)  # their names are none that this process should know
    process.start()
    process.join()
    assert process.exitcode == 0


def test_examples_of_the_runtimes_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    failed, tried = doctest.testmod(importlib.import_module("runtime"))
    assert tried and not failed
