"""Batch-norm statistics after pruning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mirrormask.buffers import kept_buffers
from mirrormask.calibration.batches import Forward, feed
from mirrormask.checks import few
from mirrormask.matrices import check_module

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> int:
    """Estimate the batch-norm statistics of ``model`` anew, as plain averages over ``batches``.

    Pruning changes what every layer puts out, and running averages of the unpruned network no longer describe it:
    without this step a small convolutional network pruned at the end loses most of its accuracy. Everything but the
    batch-norm layers runs in evaluation mode; modes and momenta are as before afterwards.

    Args:
        model: any module.
        batches: inputs, tuples whose first element is the input, or mappings of keyword arguments, on the model's
            device; at least one if the model has batch-norm layers. Some thousand examples are enough.
        forward: for other batches, ``forward(model, batch)``.

    Returns:
        How many batches were read.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``batches`` was empty and the model has batch-norm layers, or what reaches one is not finite. After
            any error the statistics are what they were.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> recalibrate(model, [torch.randn(32, 4) for _ in range(10)])
        10
    """
    check_module(model)
    names = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    norms = list(names.values())
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    restore_buffers = kept_buffers(model)
    count = 0
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.momentum = None  # a cumulative average
            norm.reset_running_stats()
        for batch in batches:
            feed(model, batch, forward)
            count += 1
        if count == 0:
            raise ValueError("batches is empty; give at least one batch of training inputs")
        bad = [name for name, norm in names.items() if not all(bool(b.isfinite().all()) for b in norm.buffers(False))]
        if bad:
            raise ValueError(f"the input of {few(bad)} is not finite: the model or a batch holds NaN or inf")
    except BaseException:
        restore_buffers()
        raise
    else:
        restore_buffers(but=norms)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return count
