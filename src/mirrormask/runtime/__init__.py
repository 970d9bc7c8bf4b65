"""Sparse execution on a CPU: ``mirrormask.compile``, ``mirrormask.runtime.load``, and what they are made of.

Names are imported when they are first used: to load and run a file, neither this package nor what it then imports needs
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mirrormask.checks import require
from mirrormask.lazy import lazily

if TYPE_CHECKING:
    from mirrormask.runtime.benchmark import BenchResult, bench
    from mirrormask.runtime.build import compile
    from mirrormask.runtime.bundle.loaded import LoadedModel
    from mirrormask.runtime.bundle.read import load
    from mirrormask.runtime.model.compiled import CompiledModel
    from mirrormask.runtime.model.report import LayerReport, Report

__all__ = ["BenchResult", "CompiledModel", "LayerReport", "LoadedModel", "Report", "bench", "compile", "load"]

_PLACES = {
    "BenchResult": "mirrormask.runtime.benchmark",
    "CompiledModel": "mirrormask.runtime.model.compiled",
    "LayerReport": "mirrormask.runtime.model.report",
    "LoadedModel": "mirrormask.runtime.bundle.loaded",
    "Report": "mirrormask.runtime.model.report",
    "bench": "mirrormask.runtime.benchmark",
    "compile": "mirrormask.runtime.build",
    "load": "mirrormask.runtime.bundle.read",
}
_get = lazily(__name__, _PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:  # before their modules import it
        require("llvmlite", "runtime", "mirrormask.runtime" if name == "load" else "mm.compile")
    return _get(name)
