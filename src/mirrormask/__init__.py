"""mirrormask: sparsify PyTorch networks to exactly the sparsity asked for, store them small, run them fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirrormask import corrections, decay, flow, geometry, masks, methods, report
    from mirrormask.batchnorm import recalibrate
    from mirrormask.distillation import Distillation, distill
    from mirrormask.methods import Method
    from mirrormask.optimizer import SparseOptimizer, apply_masks, keep_zeros
    from mirrormask.optimizer.sparsify import sparsify
    from mirrormask.pruning.prune import prune
    from mirrormask.pruning.report import PruneReport
    from mirrormask.quantization.quantize import quantize
    from mirrormask.runtime import compile
    from mirrormask.selection import Sparsity, select_weights, sparsity
    from mirrormask.storage import FormatError, export, load, predict_size, save

__version__ = "0.1.0"

__all__ = [
    "Distillation",
    "FormatError",
    "Method",
    "PruneReport",
    "SparseOptimizer",
    "Sparsity",
    "__version__",
    "apply_masks",
    "compile",
    "corrections",
    "decay",
    "distill",
    "export",
    "flow",
    "geometry",
    "keep_zeros",
    "load",
    "masks",
    "methods",
    "predict_size",
    "prune",
    "quantize",
    "recalibrate",
    "report",
    "save",
    "select_weights",
    "sparsify",
    "sparsity",
]

#: Public name -> its module, imported when the name is first used: the command line must not wait for torch
#: before it needs it, and some modules need an extra.
_LAZY: dict[str, str] = {
    "Distillation": "mirrormask.distillation",
    "FormatError": "mirrormask.storage",
    "Method": "mirrormask.methods",
    "PruneReport": "mirrormask.pruning",
    "SparseOptimizer": "mirrormask.optimizer",
    "Sparsity": "mirrormask.selection",
    "apply_masks": "mirrormask.optimizer",
    "corrections": "mirrormask.corrections",
    "compile": "mirrormask.runtime",
    "decay": "mirrormask.decay",
    "distill": "mirrormask.distillation",
    "export": "mirrormask.storage.export",
    "flow": "mirrormask.flow",
    "geometry": "mirrormask.geometry",
    "keep_zeros": "mirrormask.optimizer",
    "load": "mirrormask.storage",
    "masks": "mirrormask.masks",
    "methods": "mirrormask.methods",
    "predict_size": "mirrormask.storage",
    "prune": "mirrormask.pruning",
    "quantize": "mirrormask.quantization",
    "recalibrate": "mirrormask.batchnorm",
    "report": "mirrormask.report",
    "save": "mirrormask.storage",
    "select_weights": "mirrormask.selection",
    "sparsify": "mirrormask.optimizer",
    "sparsity": "mirrormask.selection",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(_LAZY[name])
        value = module if _LAZY[name].rpartition(".")[2] == name else getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mirrormask' has no attribute {name!r}; public names: {', '.join(__dir__())}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY})
