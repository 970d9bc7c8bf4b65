"""Batch norm over the batches of all processes, so that a run does not depend on how many share its batches.

    mean = Σ x / n,    var = Σ (x - mean)² / n,    sums over the images of all processes

torch's SyncBatchNorm does the same on GPUs only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["synchronize"]


def synchronize(model: nn.Module) -> None:
    """Let every batch norm of ``model`` see the batches of all processes while it trains.

    Modules stay what they are, with the same parameters and buffers: their forward is another. Lazy ones, and those
    that normalise each batch in evaluation too (without running averages), are left alone in evaluation.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and type(module) in KINDS:
            module.__class__ = KINDS[type(module)]


class _Sum(torch.autograd.Function):
    """The sum over processes; so is its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _forward(self: _BatchNorm, x: Tensor) -> Tensor:
    if not self.training:
        return _BatchNorm.forward(self, x)
    self._check_input_dim(x)  # type: ignore[no-untyped-call]
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = torch.full((1,), x.numel() / max(x.shape[1], 1), dtype=wide.dtype, device=x.device)
    sums = _Sum.apply(torch.cat([wide.sum(dims), count]))
    n = sums[-1]
    mean = sums[:-1] / n
    centred = wide - mean.view(shape)
    var = _Sum.apply(centred.square().sum(dims)) / n
    if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), weight)
            self.running_var.lerp_((var * n / (n - 1).clamp_min(1)).to(self.running_var), weight)
    y = centred * (var + self.eps).rsqrt().view(shape)
    if self.weight is not None:
        y = y * self.weight.view(shape)
    if self.bias is not None:
        y = y + self.bias.view(shape)
    result: Tensor = y.to(x.dtype)
    return result


def _kind(base: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(base.__name__, (base,), {"forward": _forward, "__module__": __name__})


#: By the class that is replaced; a subclass of someone else's has a forward of its own and is left alone.
KINDS: dict[type[_BatchNorm], type[_BatchNorm]] = {
    base: _kind(base) for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
