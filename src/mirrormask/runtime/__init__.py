"""Sparse execution on a CPU: ``mirrormask.compile`` and what it is made of."""

from mirrormask.checks import require

require("llvmlite", "runtime", "mm.compile")  # before the modules below import it

# ruff: noqa: E402
from mirrormask.runtime.bench import BenchResult, bench
from mirrormask.runtime.build import compile
from mirrormask.runtime.model.compiled import CompiledModel
from mirrormask.runtime.model.report import LayerReport, Report

__all__ = ["BenchResult", "CompiledModel", "LayerReport", "Report", "bench", "compile"]
