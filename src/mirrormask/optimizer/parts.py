"""What a SparseOptimizer is made of."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.methods import Method
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.edits import Edits
from mirrormask.optimizer.freezing import Freezing
from mirrormask.optimizer.mask_changes import MaskChanges
from mirrormask.optimizer.presence import Presence
from mirrormask.optimizer.training import Training
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["Parts"]


@dataclass(frozen=True)
class Parts:
    """What a SparseOptimizer is made of.

    Attributes:
        method: which one, under this base optimizer.
        weights: the sparsifiable weights.
        base: the base optimizer.
        presence: whether the model still holds what is trained.
        masks: what changes the masks.
        training: what evolves.
        edits: what others write into the weights.
        freezing: which of them are frozen, or set free.
        fused: whether the fused step may serve.
    """

    method: Method
    weights: SparseWeights
    base: BaseOptimizer
    presence: Presence
    masks: MaskChanges
    training: Training
    edits: Edits
    freezing: Freezing
    fused: bool
