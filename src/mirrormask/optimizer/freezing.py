"""Weights that are frozen, or set free, after mm.sparsify: what it means for the sparsity is said, once for each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from mirrormask.checks import callers_level, few
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["Freezing"]


class Freezing:
    """Looks at ``requires_grad``.

    The sparsity that was asked for is that of the weights that were chosen, all together, whoever trains them. So a
    weight that is frozen on the way goes on being pruned, and one that was frozen when the others were chosen stays
    dense when it is set free.

    Args:
        weights: those that were chosen.
    """

    def __init__(self, weights: SparseWeights) -> None:
        whole = {name: weights.shards.whole(x) for name, x in weights.items()}
        self._training = {name: p for name, p in whole.items() if p.requires_grad}
        self._left_out: dict[str, Tensor] = {}

    def leave_out(self, frozen: Mapping[str, Tensor]) -> None:
        """The default would have chosen these, had they not been frozen."""
        self._left_out = dict(frozen)

    def look(self) -> None:
        """Warn of what was left out and trains now."""
        free = [name for name, p in self._left_out.items() if p.requires_grad]
        if free:
            for name in free:
                del self._left_out[name]
            warnings.warn(
                f"{few(free)} {'was' if len(free) == 1 else 'were'} frozen when mm.sparsify chose the weights, and "
                "trains now: it stays dense, and the sparsity asked for is that of the others; set layers free before "
                "mm.sparsify, or name those to sparsify with weights=",
                stacklevel=callers_level(),
            )

    def before_pruning(self) -> None:
        """Warn of what is frozen and pruned nonetheless."""
        frozen = [name for name, p in self._training.items() if not p.requires_grad]
        if frozen:
            for name in frozen:
                del self._training[name]
            warnings.warn(
                f"{few(frozen)} {'was' if len(frozen) == 1 else 'were'} frozen since mm.sparsify, and "
                "pruned now as the schedule says: the sparsity asked for is that of all chosen weights together; to "
                "leave a layer as it is, leave it out with weights= from the start",
                stacklevel=callers_level(),
            )
