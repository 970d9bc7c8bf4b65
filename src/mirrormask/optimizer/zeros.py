"""Zeros that outlive the optimizer: masks for a copy of the model, and for an optimizer that knows none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mirrormask.checks import callers_level, few
from mirrormask.masked import count_true, keep_only
from mirrormask.matrices import check_module
from mirrormask.optimizer.arguments import inner_optimizer, unwrapped, warn_of_other_zeros
from mirrormask.optimizer.mistaken import refuse_by_name
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
            stem, _, leaf = bare_name(name).rpartition(".")
            above = f"{stem}." if stem else ""
            moved = {f"{above}{leaf}_orig", f"{above}parametrizations.{leaf}.original"} & bare.keys()
            if moved:
                raise ValueError(
                    f"{name!r} is made from {min(moved)!r} in every forward pass; take that away first "
                    "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)"
                )
            raise ValueError(f"the model has no parameter {name!r}; pass the model that the masks are of, or its copy")
        if p.shape != mask.shape:
            raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(p.shape)}")
        work.append((p, mask))
    for p, mask in work:
        shards = Shards([p])
        own = shards.local(p)
        keep_only(own, shards.unwrap(own, mask).to(own.device))
    torch.clear_autocast_cache()  # within a region of autocast it would hold weights of before


def keep_zeros(model: nn.Module, optimizer: Optimizer, *, weights: Weights | None = None) -> RemovableHandle:
    """Let ``optimizer`` keep every zero of the model's weights: for training on after ``finalize()`` or ``mm.load``.

    The zeros of this moment are remembered, one byte a weight, and written again after each of its steps, frozen
    weights' too; so call this once the weights are loaded. Where several optimizers train the model, call this for
    each. As all hooks of torch, this does not go along where an optimizer is copied or pickled; call it again for the
    copy.

    Args:
        model: a sparse network.
        optimizer: any torch optimizer that trains it, or one that Accelerate has prepared.
        weights: which parameters, as in :func:`mirrormask.select_weights`.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` is no torch optimizer.
        ValueError: it is a SparseOptimizer, which keeps its zeros itself, or it trains another model, or there are no
            zeros to keep.
        RuntimeError: later, in a step: the model holds other parameters, or nonzeros where its zeros are kept, since
            something else has loaded or written weights; in the latter case nothing is stepped.

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
    chosen = select_weights(model, weights, frozen=True)  # one that is set free later has its zeros too
    counted = count_zeros(chosen).layers  # of all processes: a part of a weight may have no zeros where the whole has
    some = [name for name, layer in zip(chosen, counted, strict=True) if layer.nonzeros < layer.numel]
    if not some:
        raise ValueError("the model has no zeros to keep; sparsify it first, or pass the weights= that were sparsified")
    warn_of_other_zeros(dict(model.named_parameters()), dict(model.named_modules()), trained, chosen)
    refuse_by_name()  # by torch.distributed.checkpoint too, which may have been imported since
    zeros = _Zeros(model, {name: chosen[name] for name in some})
    before, after = own._optimizer_step_pre_hooks, own._optimizer_step_post_hooks
    handle = RemovableHandle(after, extra_dict=before)  # one for both
    before[handle.id], after[handle.id] = zeros.check, zeros
    return handle


class _Zeros:
    """A hook after an optimizer's step that writes zeros where they were.

    Args:
        model: the network.
        weights: those that have zeros, by name.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._alive = {name: (p, shard_of(p.detach()) != 0) for name, p in weights.items()}
        names = {id(p): name for name, p in weights.items()}
        self._places = [
            (module, leaf, p, names[id(p)])
            for module in model.modules() for leaf, p in module._parameters.items() if id(p) in names
        ]  # fmt: skip
        self._model = model
        self._left = {name: shard_of(p.detach())._version for name, (p, _) in self._alive.items()}
        self._versions: dict[str, int] = {}
        self._warned: set[str] = set()

    @torch.no_grad()
    def check(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step: nothing has been loaded over the zeros of what it steps, where it would be lost."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, (p, mask) in self._alive.items():
            own = shard_of(p.detach())
            if id(p) not in trained or self._left[name] == own._version:
                continue
            lost = count_true((own != 0).logical_and_(~mask.to(own.device)))
            if lost:
                raise RuntimeError(
                    f"{name} holds {lost} nonzeros where its zeros are kept: other weights were loaded or written "
                    "since (load_state_dict, torch.distributed.checkpoint.load, another optimizer); call mm.keep_zeros "
                    "after loading, after handle.remove() of this one, and for each optimizer; or mm.apply_masks("
                    "model, masks) if these zeros shall stay"
                )

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        self._check_held()
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, (p, mask) in self._alive.items():
            own = shard_of(p.detach())
            mask = mask.to(own.device)
            if id(p) in trained:
                for value in _written_later(optimizer, p):
                    keep_only(value, mask)
                keep_only(own, mask)
                self._left[name] = own._version
                continue
            if self._versions.get(name) == own._version:
                continue
            if name not in self._warned and name in self._versions and bool((own != 0).logical_and_(~mask).any()):
                self._warned.add(name)
                warnings.warn(
                    f"something else than this {type(optimizer).__name__} has written over the zeros of {name}, which "
                    "are back now; call mm.keep_zeros for each optimizer that trains the model",
                    stacklevel=callers_level(),
                )
            keep_only(own, mask)
            self._versions[name] = own._version

    def _check_held(self) -> None:
        """Raise where a module has another parameter in the place of one whose zeros are kept."""
        gone = self._replaced()
        if gone:
            reshard(self._model)
            gone = self._replaced()
        if gone:
            raise RuntimeError(
                f"the model does not hold {few(gone)} any more: something has put other parameters in their place "
                "(load_state_dict(assign=True), to_empty, ...), whose zeros are not kept; build the optimizer anew, "
                "and call mm.keep_zeros again"
            )

    def _replaced(self) -> list[str]:
        found = [(module._parameters.get(leaf), p, name) for module, leaf, p, name in self._places]
        return [name for now, p, name in found if now is not None and now is not p]


def _written_later(optimizer: Optimizer, p: Tensor) -> list[Tensor]:
    """What an optimizer keeps of a parameter to write it there by itself: averages, in ``eval()``, or slow weights."""
    inner: Optimizer | None = optimizer
    kept: list[Any] = []
    while inner is not None:
        state = inner.state.get(p, {})
        kept += state.values() if hasattr(inner, "eval") else [state.get("lookahead_slow_buff")]
        inner = inner_optimizer(inner)
    found = [shard_of(value.detach()) for value in kept if isinstance(value, Tensor)]
    return [value for value in found if value.shape == shard_of(p).shape]
