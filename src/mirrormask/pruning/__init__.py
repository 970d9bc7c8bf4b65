"""Sparsity without training: layer by layer, on calibration batches.

The folder is not named after its function, ``mm.prune``: a module of that name would take its place once imported.
"""

from mirrormask.pruning.prune import prune
from mirrormask.pruning.report import PrunedLayer, PruneReport

__all__ = ["PruneReport", "PrunedLayer", "prune"]
