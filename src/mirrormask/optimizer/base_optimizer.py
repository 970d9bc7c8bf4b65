"""How a SparseOptimizer and the base optimizer hang together: what is checked, who holds what, at which rate."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mirrormask.methods import Method
from mirrormask.selection import Weights, select_weights

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["check_arguments", "held_weights", "link", "step_plain_parameters", "sync_groups"]


def check_arguments(model: nn.Module, base: Optimizer, method: Method) -> None:
    """Raise a TypeError or ValueError for what cannot be wrapped."""
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}, not an nn.Module")
    if not isinstance(base, Optimizer):
        raise TypeError(f"optimizer={base!r} is a {type(base).__name__}, not a torch optimizer")
    if isinstance(base, SparseOptimizer):
        raise ValueError("this optimizer is wrapped already; pass the base optimizer, and wrap it once")
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the model inside its step, where latents cannot be pushed; use SGD or Adam")
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is a {type(method).__name__}; pass mm.methods.pilot(sparsity=0.95), say")
    if getattr(base.step, "_wrapped_by_lr_sched", False):
        raise ValueError("a scheduler is built on this optimizer already; build it on what mm.sparsify returns")


def held_weights(model: nn.Module, base: Optimizer, weights: Weights | None) -> dict[str, nn.Parameter]:
    """The weights to sparsify, by name; a ValueError where the base optimizer does not hold one."""
    chosen = select_weights(model, weights)
    held = {id(p) for group in base.param_groups for p in group["params"]}
    missing = [name for name, p in chosen.items() if id(p) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; "
            "build it over model.parameters(), or choose other weights with weights="
        )
    return chosen


def link(optimizer: SparseOptimizer) -> None:
    """Build the base optimizer's groups: per group of ours one for plain parameters and one for each rate."""
    geometry = optimizer.method.geometry
    stepped = geometry.latents if geometry.stepped is None else geometry.stepped
    groups: list[dict[str, Any]] = []
    optimizer.links, optimizer._stepped = [], []
    for index, group in enumerate(optimizer.param_groups):
        plain: list[Tensor] = []
        by_rate: defaultdict[tuple[float, bool], list[Tensor]] = defaultdict(list)
        owners: dict[Tensor, Tensor] = {}  # what a step after the optimizer's acts on -> the model's weight
        for p in group["params"]:
            if geometry.latents and optimizer.is_sparsified(p):
                for name in geometry.latents:
                    latent = optimizer.state[p][name]
                    by_rate[optimizer.state[p]["rate"], name in geometry.weight_decayed].append(latent)
                    if name in stepped:
                        owners[latent] = p
            else:
                plain.append(p)
                if optimizer.is_sparsified(p):
                    owners[p] = p
        for (rate, decayed), params in [((None, True), plain), *by_rate.items()]:
            groups.append({**group, "params": params})
            optimizer.links.append((index, rate, decayed))
            optimizer._stepped.append([(p, owners[p]) for p in params if p in owners])
    optimizer.base.param_groups = groups
    sync_groups(optimizer)


def sync_groups(optimizer: SparseOptimizer) -> None:
    """Carry the groups' options (a scheduler may have changed them) to the base optimizer's groups."""
    for (index, rate, decayed), inner in zip(optimizer.links, optimizer.base.param_groups, strict=True):
        for key, value in optimizer.param_groups[index].items():
            if key != "params":
                inner[key] = value
        if rate is not None:
            inner["lr"] = optimizer.param_groups[index]["lr"] * rate
            if "weight_decay" in inner and not decayed:
                inner["weight_decay"] = 0.0


def step_plain_parameters(optimizer: SparseOptimizer) -> None:
    """Step what the base optimizer trains itself; groups of latents cost time even where they have no gradient."""
    groups = optimizer.base.param_groups
    optimizer.base.param_groups = [
        group for group, (_, rate, _) in zip(groups, optimizer.links, strict=True) if rate is None and group["params"]
    ]
    try:
        if optimizer.base.param_groups:
            optimizer.base.step()
    finally:
        optimizer.base.param_groups = groups
