"""Whether the model still holds the parameters that are trained: the promise is about the model, not about notes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mirrormask.checks import few
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["Presence"]


class Presence:
    """Looks at the model's own parameters.

    Args:
        model: the network.
        weights: those of its parameters that become sparse.
    """

    def __init__(self, model: nn.Module, weights: SparseWeights) -> None:
        self.model = model
        self._weights = weights
        modules = dict(model.named_modules(remove_duplicate=False))
        self._places = {name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in weights}
        self._kinds = {name: (x.shape, x.dtype, x.device) for name, x in weights.items()}

    def check(self) -> None:
        """Raise unless each weight is the model's own parameter, of the shape, dtype and device that it had.

        Raises:
            RuntimeError: it names the parameters, and the order that works.
        """
        gone = [name for name, (module, leaf) in self._places.items()
                if module._parameters.get(leaf) is not self._weights[name]]  # fmt: skip
        if gone:
            there = {id(p) for p in self.model.parameters()}  # a parametrization moves a parameter, and keeps it
            gone = [name for name in gone if id(self._weights[name]) not in there]
        if gone:
            raise RuntimeError(
                f"the model does not hold {few(gone)} any more: something has put other parameters in their place "
                "(fully_shard, to_empty, load_state_dict(assign=True), quantization, ...), which this optimizer does "
                "not train; do that first, then build the optimizer, then call mm.sparsify"
            )
        for name, x in self._weights.items():
            shape, dtype, device = self._kinds[name]
            if x.shape != shape or x.dtype != dtype or x.device != device:
                raise RuntimeError(
                    f"{name!r} was {tuple(shape)}, {dtype} on {device} when mm.sparsify was called and is "
                    f"{tuple(x.shape)}, {x.dtype} on {x.device} now; move and convert the model first, then build the "
                    "optimizer, then call mm.sparsify"
                )
            if x.grad is not None and x.grad.layout != torch.strided:
                raise RuntimeError(
                    f"the gradient of {name!r} is sparse, and a mask needs a dense one; build its layer with "
                    "sparse=False, or leave it out with weights="
                )

    def check_finite(self) -> None:
        """Raise unless all numbers in the weights are finite.

        Raises:
            RuntimeError: it names the weights.
        """
        bad = [name for name, x in self._weights.items() if not bool(x.isfinite().all())]
        if bad:
            raise RuntimeError(
                f"{few(bad)} {'is' if len(bad) == 1 else 'are'} not finite: training has diverged; lower the "
                "learning rate or clip gradients, and go on from a checkpoint of before"
            )

    def names(self, parameters: Iterable[Tensor]) -> str:
        """What the model calls these parameters."""
        wanted = {id(p) for p in parameters}
        found = [name for name, p in self.model.named_parameters() if id(p) in wanted]
        return few(found) if found else f"{len(wanted)} parameters"
