"""Zeros that outlive the optimizer: masks for a copy of the model, and for an optimizer that knows none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mirrormask.masked import keep_only
from mirrormask.matrices import check_module
from mirrormask.optimizer.arguments import unwrapped
from mirrormask.optimizer.shards import Shards, shard_of
from mirrormask.optimizer.sparse_optimizer import SparseOptimizer
from mirrormask.optimizer.weights import bare_name
from mirrormask.resharding import reshard
from mirrormask.selection import Weights, count_zeros, select_weights

__all__ = ["apply_masks", "keep_zeros"]


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, what the masks remove.

    An average of weights (EMA, SWA) is of many masks, and as dense as the first of them. Give it the last one, and then
    let batch norm see some data (:func:`mirrormask.recalibrate`).

    Args:
        model: the network, or a copy or average of it; what wrappers put in front of names does not matter.
        masks: parameter name -> bool tensor of the parameter's shape, True where the weight lives: those of
            ``optimizer.masks``.

    Raises:
        TypeError: a mask is not a bool tensor, or ``masks`` holds none by name.
        ValueError: the model has no parameter of that name, or one of another shape; nothing has changed then.

    Example:
        >>> average = nn.Linear(3, 1, bias=False)
        >>> _ = average.weight.data.fill_(2.0)
        >>> apply_masks(average, {"weight": torch.tensor([[True, False, True]])})
        >>> average.weight.tolist()
        [[2.0, 0.0, 2.0]]
    """
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks is a {type(masks).__name__}, not masks by name; pass optimizer.masks of what mm.sparsify returned"
        )
    check_module(model)
    reshard(model)
    exact = dict(model.named_parameters(remove_duplicate=False))
    bare = {bare_name(name): p for name, p in exact.items()}
    work = []
    for name, mask in masks.items():
        p = exact.get(name, bare.get(bare_name(name)))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"the mask of {name!r} is a {getattr(mask, 'dtype', type(mask).__name__)}, not a bool tensor"
            )
        if p is None:
            raise ValueError(f"the model has no parameter {name!r}; pass the model that the masks are of, or its copy")
        if p.shape != mask.shape:
            raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(p.shape)}")
        work.append((p, mask))
    for p, mask in work:
        shards = Shards([p])
        own = shards.local(p)
        keep_only(own, shards.unwrap(own, mask).to(own.device))


def keep_zeros(model: nn.Module, optimizer: Optimizer, *, weights: Weights | None = None) -> RemovableHandle:
    """Let ``optimizer`` keep every zero of the model's weights: for training on after ``finalize()`` or ``mm.load``.

    The zeros of this moment are remembered, one byte a weight, and written again after each of its steps.

    Args:
        model: a sparse network.
        optimizer: any torch optimizer that trains it, or one that Accelerate has prepared.
        weights: which parameters, as in :func:`mirrormask.select_weights`.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer.
        ValueError: it is a SparseOptimizer, which keeps its zeros itself, or it trains another model, or there are no
            zeros to keep.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, 0.0, 2.0]])
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> _ = keep_zeros(model, optimizer)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> model.weight[0, 1].item()
        0.0
    """
    own, _ = unwrapped(optimizer)
    if not isinstance(own, Optimizer):
        raise TypeError(f"optimizer={own!r} is a {type(own).__name__}, not a torch optimizer")
    if isinstance(own, SparseOptimizer):
        raise ValueError("a SparseOptimizer keeps its zeros itself, after finalize() too")
    check_module(model)
    reshard(model)
    trained = {id(p) for group in own.param_groups for p in group["params"]}
    if not any(id(p) in trained for p in model.parameters()):
        raise ValueError(
            f"this {type(own).__name__} holds no parameter of the model, so it trains another one; pass the optimizer "
            "that was built over model.parameters(), of a sharded one before its first forward pass"
        )
    chosen = select_weights(model, weights)
    counted = count_zeros(chosen).layers  # of all processes: a part of a weight may have no zeros where the whole has
    some = [p for p, layer in zip(chosen.values(), counted, strict=True) if layer.nonzeros < layer.numel]
    alive = {p: shard_of(p.detach()) != 0 for p in some}
    if not alive:
        raise ValueError("the model has no zeros to keep; sparsify it first, or pass the weights= that were sparsified")

    @torch.no_grad()
    def fill(*_: Any) -> None:
        for p, mask in alive.items():
            own = shard_of(p.detach())
            keep_only(own, mask.to(own.device))

    handle: RemovableHandle = own.register_step_post_hook(fill)
    return handle
