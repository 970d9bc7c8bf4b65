"""Weights that are frozen, set free, or new, after mm.sparsify: what that means for the sparsity is said, once each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from mirrormask.checks import callers_level, few
from mirrormask.matrices import default_weights
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
        self._chosen = list(whole.values())
        self._left_out: dict[str, Tensor] = {}
        self._known: set[str] | None = None

    def leave_out(self, frozen: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """The default chose the weights.

        Args:
            frozen: what it would have chosen too, had that not been frozen.
            names: of all parameters that the model had.
        """
        self._left_out, self._known = dict(frozen), set(names)

    def look_for_new(self, model: nn.Module) -> None:
        """Warn of what the default would choose too, had it been there."""
        if self._known is None:
            return
        own = {id(p) for p in self._chosen}
        new = [
            name
            for name, p in default_weights(model, frozen=False).items()
            if id(p) not in own and name not in self._known
        ]
        if new:
            self._known.update(new)
            warnings.warn(
                f"{few(new)} came into the model after mm.sparsify and {'is' if len(new) == 1 else 'are'} dense: the "
                "sparsity asked for is that of the weights that were chosen then; build the whole model before "
                "mm.sparsify, or name the weights to sparsify with weights= if that is what you mean",
                stacklevel=callers_level(),
            )

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
