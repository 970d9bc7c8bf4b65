"""The fused step of a SparseOptimizer: whether it may serve, and which update steps which parameters."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mirrormask.optimizer.base_optimizer import step_plain_parameters
from mirrormask.optimizer.steps.fused_cpu.dual import Dual
from mirrormask.optimizer.steps.fused_cpu.plain import Plain
from mirrormask.optimizer.steps.fused_cpu.product import Product
from mirrormask.optimizer.steps.fused_cpu.table import Table
from mirrormask.optimizer.steps.fused_cpu.update import Update

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["FusedStep"]

#: The updates of sparsifiable weights that there are.
UPDATES: tuple[Update, ...] = (Product(), Dual())
PLAIN = Plain()


class FusedStep:
    """The fused step of one SparseOptimizer: :meth:`prepare`, :meth:`finite`, :meth:`step`, in this order."""

    def __init__(self, optimizer: SparseOptimizer) -> None:
        self._optimizer = optimizer
        self._weights = list(optimizer.weights.values())
        geometry = optimizer.method.geometry
        self._update = next((update for update in UPDATES if update.serves(geometry)), None)
        self._possible = self._can_serve()
        chosen = {id(x) for x in self._weights}
        self._others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in chosen]
        self._others_are_plain = all(map(_is_plain, self._others))
        self._table: Table | None = None
        self._plain: Table | None = None  # of the other parameters that have gradients

    def _can_serve(self) -> bool:
        """What cannot change between steps: the kinds of base and geometry, devices, dtypes and layouts."""
        optimizer = self._optimizer
        if (
            type(optimizer.base) is not torch.optim.SGD
            or self._update is None
            or optimizer.method.correction is not None
        ):
            return False
        if importlib.util.find_spec("llvmlite") is None:
            return False
        return all(
            _is_plain(tensor) and tensor.stride() == x.stride()
            for x in self._weights
            for tensor in (x, *(optimizer.state[x][name] for name in self._update.latents))
        )

    def prepare(self) -> bool:
        """Whether the options and gradients allow this step; nothing that is trained changes here."""
        optimizer = self._optimizer
        if not self._possible or self._update is None:
            return False
        groups = optimizer.param_groups
        nesterov = groups[0]["nesterov"]
        if any(
            group["dampening"] or group["maximize"] or group["differentiable"] or group["nesterov"] != nesterov
            for group in groups
        ):
            return False
        masks = self._update.masks(optimizer)
        if masks is not None and [mask.stride() for mask in masks] != [x.stride() for x in self._weights]:
            return False
        if self._table is None or not self._table.fits(self._weights):
            self._table = Table(self._update, optimizer, self._weights)
        if not self._table.take_gradients():
            return False
        self._prepare_plain()
        return True

    def _prepare_plain(self) -> None:
        """Set up the table of the other parameters; none where the base optimizer must step them itself."""
        live = [p for p in self._others if p.grad is not None] if self._others_are_plain else []
        base = self._optimizer.base
        hooks = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
        if not live or hooks or not all(group["momentum"] for group in self._optimizer.param_groups):
            self._plain = None
            return
        if self._plain is None or not self._plain.fits(live):
            self._plain = Table(PLAIN, self._optimizer, live)
        if not self._plain.take_gradients():
            self._plain = None

    @property
    def _nesterov(self) -> bool:
        return bool(self._optimizer.param_groups[0]["nesterov"])

    def finite(self) -> bool:
        """Whether all gradients are finite, as :func:`mirrormask.optimizer.steps.any_base.keep_finite` says it."""
        from mirrormask.optimizer.steps.any_base import keep_finite

        assert self._table is not None
        if not self._table.finite(nesterov=self._nesterov):
            return False
        if self._plain is not None:
            return self._plain.finite(nesterov=self._nesterov)
        return keep_finite([p.grad for p in self._others if p.grad is not None])

    def step(self) -> None:
        """One whole step."""
        assert self._table is not None
        assert self._update is not None
        self._table.step(nesterov=self._nesterov, masks=self._update.masks(self._optimizer))
        if self._plain is not None:
            self._plain.step(nesterov=self._nesterov, masks=None)
        else:
            step_plain_parameters(self._optimizer)


def _is_plain(tensor: Tensor) -> bool:
    """A float32 tensor in CPU memory without holes, in either of torch's two layouts, and of no special kind."""
    kind = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return kind and dense
