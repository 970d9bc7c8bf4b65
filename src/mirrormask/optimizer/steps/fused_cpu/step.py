"""The fused step: whether it may serve, and which update steps which parameters."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mirrormask.methods import Method
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.steps.base import Now, Step, all_finite
from mirrormask.optimizer.steps.fused_cpu.dual import Dual
from mirrormask.optimizer.steps.fused_cpu.plain import Plain
from mirrormask.optimizer.steps.fused_cpu.product import Product
from mirrormask.optimizer.steps.fused_cpu.table import Table
from mirrormask.optimizer.steps.fused_cpu.update import Update
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["FusedCPU"]

#: The updates of sparsifiable weights that there are.
UPDATES: tuple[Update, ...] = (Product(), Dual())
#: The same with momenta in bfloat16.
NARROW: tuple[Update, ...] = (Product(narrow=True), Dual(narrow=True))
PLAIN = Plain()


class FusedCPU(Step):
    """SGD without dampening on float32 weights in CPU memory, in the geometries of :data:`UPDATES`, in one loop."""

    def __init__(self, method: Method, weights: SparseWeights, base: BaseOptimizer) -> None:
        super().__init__(method, weights, base)
        updates = UPDATES if base.state_dtype is None else NARROW
        self._update = next((update for update in updates if update.serves(weights.geometry)), None)
        self._possible = self._can_serve()
        self._table: Table | None = None
        self._plain: Table | None = None  # of the other parameters that have gradients
        self._groups = {base.group_of[x] for x in weights.values()}

    def _can_serve(self) -> bool:
        """What cannot change between steps: the kinds of base and geometry, devices, dtypes and layouts."""
        if type(self.base.torch) is not torch.optim.SGD or self._update is None or self.method.correction is not None:
            return False
        if importlib.util.find_spec("llvmlite") is None:
            return False
        return all(
            _is_plain(tensor) and tensor.stride() == x.stride()
            for x in self.weights.values()
            for tensor in (x, *(self.weights.state(x)[name] for name in self._update.latents))
        )

    def ready(self, now: Now) -> bool:
        """Whether the options and gradients allow this step."""
        if not self._possible or self._update is None or self.base.has_hooks:
            return False
        options = [self.base.options(group) for group in range(len(now.lrs))]
        if any(
            group["dampening"] or group["maximize"] or group["differentiable"] or group["nesterov"] != self._nesterov
            for group in options
        ):
            return False
        momenta = {bool(options[group]["momentum"]) for group in self._groups}
        if len(momenta) != 1:
            return False
        own = list(self.weights.values())
        masks = self._update.masks(self.weights)
        if masks is not None and [mask.stride() for mask in masks] != [x.stride() for x in own]:
            return False
        (has_momenta,) = momenta
        if self._table is None or not self._table.fits(own, momenta=has_momenta):
            if not self._alike(self._update, own, momenta=has_momenta):
                return False
            self._table = Table(self._update, self.weights, self.base, own, momenta=has_momenta)
        if not self._table.take_gradients():
            return False
        self._ready_plain(all(group["momentum"] for group in options))
        return True

    def _ready_plain(self, momentum: bool) -> None:
        """Set up the table of the other parameters; none where the base optimizer must step them itself."""
        others = self.base.plain
        live = [p for p in others if p.grad is not None]
        if not live or not momentum or not all(map(_is_plain, others)):
            self._plain = None
            return
        if self._plain is None or not self._plain.fits(live, momenta=True):
            if not self._alike(PLAIN, live, momenta=True):
                self._plain = None
                return
            self._plain = Table(PLAIN, self.weights, self.base, live)
        if not self._plain.take_gradients():
            self._plain = None

    def _alike(self, update: Update, parameters: Sequence[Tensor], *, momenta: bool) -> bool:
        """Whether every array lies in memory as its parameter does: a loop reads them by one index.

        They did at the start, but the model may have been converted to channels_last since, or the state loaded.
        """
        return all(
            tensor.shape == p.shape and tensor.dtype == update.dtype(field) and tensor.stride() == p.stride()
            for field, tensors in update.tensors(list(parameters), self.weights, self.base, momenta=momenta).items()
            for tensor, p in zip(tensors, parameters, strict=True)
        )

    @property
    def _nesterov(self) -> bool:
        return bool(self.base.options(0)["nesterov"])

    @property
    def snaps(self) -> bool:
        """Whether its update does."""
        return self._update is not None and self._update.snaps

    @property
    def narrow(self) -> bool:
        """Whether its update does."""
        return self._possible and self._update is not None and self._update.narrow

    def finite(self) -> bool | Tensor:
        """Whether all gradients are finite; torch's sums, where the loops do not serve."""
        assert self._table is not None
        if not self._table.finite(nesterov=self._nesterov):
            return False
        if self._plain is not None:
            return self._plain.finite(nesterov=self._nesterov)
        return all_finite([p.grad for p in self.base.plain if p.grad is not None], self.weights.shards)

    def run(self, now: Now) -> None:
        """One whole step."""
        assert self._table is not None
        assert self._update is not None
        self._table.step(now, nesterov=self._nesterov, masks=self._update.masks(self.weights))
        if self._plain is not None:
            self._plain.step(now, nesterov=self._nesterov, masks=None)
        else:
            self.base.step_plain()


def _is_plain(tensor: Tensor) -> bool:
    """A float32 tensor in CPU memory without holes, in either of torch's two layouts, and of no special kind."""
    kind = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.is_cpu
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return kind and dense
