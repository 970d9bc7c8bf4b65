"""Momenta in fewer bits than weights: for the one step that rounds them at random, and refused for all others."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NoReturn

import torch

from mirrormask.checks import few
from mirrormask.optimizer.base_groups import Group
from mirrormask.optimizer.parts import Parts
from mirrormask.optimizer.steps.fused_cpu import FusedCPU

__all__ = ["check_state_dtype", "refuse_step"]

REMEDY = "leave out state_dtype="


def check_state_dtype(parts: Parts, groups: Sequence[Group]) -> None:
    """Refuse ``state_dtype`` where steps would not be those that keep it.

    Args:
        parts: of the training, whose weights have their latents.
        groups: of the SparseOptimizer.

    Raises:
        ValueError: it says what is in the way.
    """
    dtype = parts.base.state_dtype
    if dtype is None:
        return
    if dtype != torch.bfloat16:
        raise ValueError(f"state_dtype={dtype!r} is neither torch.bfloat16 nor None")
    why = _in_the_way(parts, groups)
    if why is not None:
        raise ValueError(f"state_dtype={dtype} is kept by the fused step on a CPU only, and {why}; {REMEDY}")


def refuse_step(parts: Parts, groups: Sequence[Group]) -> NoReturn:
    """This step is not one that keeps it: another would round to the nearest, and momenta would stand still.

    Raises:
        RuntimeError: it says what is in the way.
    """
    still = [name for name, x in parts.weights.items() if x.grad is None]
    why = _in_the_way(parts, groups)
    if why is None:
        why = f"there is no gradient of {few(still)} (frozen?)" if still else "gradients or options are not for it"
    raise RuntimeError(
        f"state_dtype={parts.base.state_dtype} is kept by the fused step on a CPU only, and {why}; {REMEDY}"
    )


def _in_the_way(parts: Parts, groups: Sequence[Group]) -> str | None:
    kind, weights, geometry = type(parts.base.torch), parts.weights, parts.weights.geometry
    if kind is not torch.optim.SGD:
        return f"the base optimizer is {kind.__name__}, not torch.optim.SGD"
    own = {parts.base.group_of[x] for x in weights.values()}
    for index, group in enumerate(groups):
        if index in own and not group["momentum"]:
            return "momentum=0 keeps nothing"
        for option in ("dampening", "maximize", "differentiable"):
            if group[option]:
                return f"{option}={group[option]!r} is not for it"
    if len({bool(group["nesterov"]) for group in groups}) != 1:
        return "nesterov= is not the same in all groups"
    if not parts.fused:
        return "fused=False turns it off"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed"
    other = [name for name, x in weights.items() if not x.is_cpu or x.dtype != torch.float32]
    if other:
        return f"{few(other)} {'is' if len(other) == 1 else 'are'} not float32 in CPU memory"
    if parts.method.correction is not None:
        return f"{parts.method.name!r} has a correction, {type(parts.method.correction).__name__}"
    if not FusedCPU(parts.method, weights, parts.base).narrow:
        return f"{parts.method.name!r} trains {type(geometry).__name__}, for which there is none"
    if parts.base.has_hooks:
        return "the base optimizer has hooks"
    return None
