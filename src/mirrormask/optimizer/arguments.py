"""What can be wrapped, and what is refused before the first step, each with its remedy."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mirrormask.checks import callers_level, few
from mirrormask.flats import count_each, which_not_finite
from mirrormask.masks.patterns import check_pattern
from mirrormask.matrices import EMBEDDINGS, candidates, check_module, default_weights, inputs_elsewhere, output_axis
from mirrormask.methods import Method
from mirrormask.optimizer.base_groups import check_group
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.processes import Processes
from mirrormask.optimizer.scores import SPREAD_SCORES
from mirrormask.optimizer.shards import is_sharded, shard_of
from mirrormask.optimizer.weights import SparseWeights
from mirrormask.overlaps import check_memory
from mirrormask.selection import Weights, select_weights
from mirrormask.selection_notes import on_frozen

__all__ = [
    "check_arguments",
    "check_shards",
    "frozen_weights",
    "held_weights",
    "inner_optimizer",
    "turned_by_maximize",
    "unwrapped",
    "warn_of_other_zeros",
]

#: A matrix with this share of zeros, and not of zeros alone, was made sparse.
SPARSE_ALREADY = 0.3


def unwrapped(optimizer: Any) -> tuple[Any, Any]:
    """The torch optimizer within one that Accelerate has prepared, and that wrapper; otherwise itself, and None."""
    if any(kind.__name__ == "AcceleratedOptimizer" for kind in type(optimizer).__mro__):
        return optimizer.optimizer, optimizer
    return optimizer, None


def inner_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer that one holds and steps through, as a Lookahead does; None where there is none."""
    return next((held for held in map(_an_optimizer_in, vars(optimizer).values()) if held is not None), None)


def check_arguments(model: nn.Module, base: Optimizer, method: Method) -> None:
    """Raise a TypeError or ValueError for what cannot be wrapped."""
    check_module(model)
    if not isinstance(base, Optimizer):
        raise TypeError(f"optimizer={base!r} is a {type(base).__name__}, not a torch optimizer")
    names = [kind.__name__ for kind in type(base).__mro__]
    if "LBFGS" in names:
        raise ValueError("LBFGS evaluates the model inside its step, where latents cannot be pushed; use SGD or Adam")
    if "SparseAdam" in names:
        raise ValueError("SparseAdam takes sparse gradients only, and weights to sparsify have dense ones; use Adam")
    if "ZeroRedundancyOptimizer" in names:
        raise ValueError(
            "ZeroRedundancyOptimizer shares parameters out to processes before latents can take their place; pass the "
            "optimizer that it was to wrap, or shard the model with fully_shard"
        )
    inner = inner_optimizer(base)
    if inner is not None:
        raise ValueError(
            f"{type(base).__name__} steps through the {type(inner).__name__} that it holds, and would step the "
            "weights instead of their latents; pass that one to mm.sparsify, and wrap what it returns "
            "(of Lightning's Fabric: call mm.sparsify before fabric.setup)"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(base).__name__}.step() needs a closure, since it evaluates the model inside its step, where "
            "latents cannot be pushed; use SGD or Adam"
        )
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is a {type(method).__name__}; pass mm.methods.pilot(sparsity=0.95), say")
    if getattr(base.step, "_wrapped_by_lr_sched", False):
        raise ValueError("a scheduler is built on this optimizer already; build it on what mm.sparsify returns")
    for group in base.param_groups:
        check_group(group, turns=turned_by_maximize(method))


def turned_by_maximize(method: Method) -> str:
    """The method's name, if ``maximize=True`` would turn its own pull around; empty if it has none."""
    pulls = method.correction or method.decay.coupled or method.geometry.sparsifies
    return method.name if pulls else ""


def held_weights(
    model: nn.Module, base: Optimizer, weights: Weights | None, method: Method, processes: Processes
) -> dict[str, nn.Parameter]:
    """The weights to sparsify, by name.

    Raises:
        ValueError: the base optimizer does not hold one, one has sparse gradients or numbers that are not finite, or an
            N:M pattern would not run along its input, or a correction's scales along its outputs.
    """
    pattern, correction = method.mask.pattern, method.correction
    own_parameters = dict(model.named_parameters())
    fsdp1 = [
        name
        for name, p in own_parameters.items()
        if getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False)
    ]
    if fsdp1:
        raise ValueError(
            f"{few(fsdp1)}: FullyShardedDataParallel lays parameters end to end and cuts them anywhere, so that no "
            "process knows which of its numbers is which; use torch.distributed.fsdp.fully_shard, then build the "
            "optimizer, then call mm.sparsify"
        )
    chosen = select_weights(model, weights)
    is_frozen = not all(p.requires_grad for p in own_parameters.values())
    if weights is None and is_frozen and (said := on_frozen(candidates(model), chosen)):  # to list them takes a while
        warnings.warn(said, stacklevel=callers_level())
    held = {id(p) for group in base.param_groups for p in group["params"]}
    missing = [name for name, p in chosen.items() if id(p) not in held]
    if missing and all(is_sharded(chosen[name]) for name in missing):
        raise ValueError(
            f"the optimizer does not hold {few(missing)}, which are sharded: it was built before the model was, or "
            "after a forward pass, which leaves whole tensors in their place until model.reshard(); build it over "
            "model.parameters() after fully_shard(model) and before the first forward pass, then call mm.sparsify"
        )
    if missing:
        raise ValueError(
            f"the optimizer does not hold {few(missing)}; build it over model.parameters(), or choose other weights "
            "with weights="
        )
    owners = dict(model.named_modules())
    for name in chosen:
        owner = owners.get(name.rpartition(".")[0])
        if isinstance(owner, EMBEDDINGS) and owner.sparse:  # not just anything that has an attribute of that name
            raise ValueError(
                f"{name!r} has sparse gradients; build the {type(owner).__name__} with sparse=False, or leave it out"
            )
        if chosen[name].is_inference():
            raise ValueError(
                f"{name!r} was made in inference mode, where nothing can be trained; build the model outside of it"
            )
        if pattern is not None and owner is not None and inputs_elsewhere(owner):
            raise ValueError(
                f"pattern={pattern!r} runs along dimension 1, which is not the input of {name!r}, a "
                f"{type(owner).__name__}; leave it out with weights="
            )
        if correction is not None and correction.by_output and owner is not None and output_axis(owner) != 0:
            raise ValueError(
                f"{type(correction).__name__} goes by outputs, the first dimension of a weight, which is not that of "
                f"{name!r}, a {type(owner).__name__}; leave it out with weights="
            )
    check_memory(model, chosen, [p for group in base.param_groups for p in group["params"]])
    warn_of_other_zeros(own_parameters, owners, held, chosen)
    own = {name: shard_of(p.detach()) for name, p in chosen.items()}
    seen = {name: p for name, p in own.items() if _has_values(p)}
    bad = [name for name, is_bad in zip(seen, which_not_finite(list(seen.values())), strict=True) if is_bad]
    if any(map(is_sharded, chosen.values())) and processes.count > 1:
        flags = processes.max(torch.tensor([name in bad for name in chosen], dtype=torch.int64))
        bad = [name for name, flag in zip(chosen, flags.tolist(), strict=True) if flag]
    if bad:
        raise ValueError(
            f"{few(bad)} {'is' if len(bad) == 1 else 'are'} not finite: no latents and no mask can be made of NaN or "
            "inf; initialise or load the weights before mm.sparsify"
        )
    return chosen


def warn_of_other_zeros(
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, nn.Module],
    held: Container[int],
    chosen: Mapping[str, Tensor],
) -> None:
    """Warn of matrices that are sparse already, are trained, and were not chosen: one step, and they are dense."""
    own = {id(p) for p in chosen.values()}
    others = {
        name: shard_of(p.detach())
        for name, p in parameters.items()
        if p.dim() > 1 and p.requires_grad and id(p) in held and id(p) not in own
        and not isinstance(owners.get(name.rpartition(".")[0]), EMBEDDINGS)
    }  # fmt: skip
    others = {name: p for name, p in others.items() if _has_values(p) and p.layout == torch.strided}
    counts = zip(others.items(), count_each(list(others.values())), strict=True)
    sparse = [name for (name, p), n in counts if 0 < n < (1 - SPARSE_ALREADY) * p.numel()]
    if sparse:
        warnings.warn(
            f"{few(sparse)} {'is' if len(sparse) == 1 else 'are'} sparse already and not among the weights chosen "
            "here, and this optimizer will train the zeros away; leave what shall stay sparse out of the optimizer, or "
            "choose it as well with weights=",
            stacklevel=callers_level(),
        )


def frozen_weights(model: nn.Module, base: Optimizer) -> dict[str, nn.Parameter]:
    """What the default leaves out as it is frozen, by name, of what the base optimizer holds."""
    held = {id(p) for group in base.param_groups for p in group["params"] if not p.requires_grad}
    if not held:
        return {}  # to list all parameters takes a while
    return {name: p for name, p in default_weights(model, frozen=True).items() if id(p) in held}


def check_shards(method: Method, weights: SparseWeights, base: BaseOptimizer) -> None:
    """Where several processes hold parts of a weight: refuse what one part cannot know.

    Raises:
        ValueError: it says why, and what to take instead.
    """
    shards, mask = weights.shards, method.mask
    if not shards.spread:
        return
    if mask.score not in SPREAD_SCORES:
        why = "reads gradients of whole weights before they are sharded"
        if mask.score == "lamp":
            why = "ranks a weight among all of its tensor"
        raise ValueError(
            f"score={mask.score!r} {why}, and several processes hold parts of it; choose one of "
            f"{', '.join(sorted(SPREAD_SCORES))}, or train with DistributedDataParallel"
        )
    for part in (method.geometry, method.correction):
        if part is not None and not vars(type(part)).get("shards", False):
            raise ValueError(
                f"{type(part).__name__} of the method {method.name!r} does not say that it may be given a part of a "
                "weight, and several processes hold parts; train with DistributedDataParallel, choose another method, "
                "or, if the class is your own and sums over a tensor through self.held alone, set shards = True in its "
                "class body"
            )
    if not base.splits:
        raise ValueError(
            f"{type(base.torch).__name__} steps a part of a tensor otherwise than the whole one, and several processes "
            "hold parts; use an elementwise optimizer, such as torch.optim.AdamW"
        )
    if mask.pattern is not None:
        _, m = check_pattern(mask.pattern)
        torn = [name for name, x in weights.items() if not _in_groups(shards.places(x, 1), m)]
        flags = shards.max([name in torn for name in weights])
        torn = [name for name, flag in zip(weights, flags, strict=True) if flag]
        if torn:
            raise ValueError(
                f"pattern={mask.pattern!r} runs across the edge of a shard in {few(torn)}: shard its rows, or columns "
                f"in multiples of {m}"
            )


def _in_groups(columns: Tensor | None, m: int) -> bool:
    """Whether the columns that are here are whole groups of m."""
    if columns is None:
        return True
    if len(columns) % m:
        return False
    groups = columns.view(-1, m)
    return bool((groups[:, :1] % m == 0).all() and (groups == groups[:, :1] + torch.arange(m)).all())


def _an_optimizer_in(value: Any) -> Optimizer | None:
    """The optimizer that an attribute is, or is a collection of."""
    if isinstance(value, Mapping):
        value = list(value.values())
    held = value if isinstance(value, (list, tuple)) else (value,)
    return next((item for item in held if isinstance(item, Optimizer)), None)


def _has_values(p: Tensor) -> bool:
    return not p.is_meta and not isinstance(p, torch._subclasses.FakeTensor)
