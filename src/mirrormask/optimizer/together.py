"""What processes that train one model agree on: when they begin, when they load, and whenever a mask changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mirrormask.methods.description import describe
from mirrormask.optimizer.agreement import agree, fingerprint
from mirrormask.optimizer.base_groups import Group, plain_options
from mirrormask.optimizer.parts import Parts
from mirrormask.optimizer.shards import is_sharded

__all__ = ["agree_on_state", "begin_together"]


def begin_together(parts: Parts, groups: Sequence[Group]) -> None:
    """All processes have one configuration, and of what each holds whole, the weights of the first."""
    weights, shards = parts.weights, parts.weights.shards
    if shards.processes.count == 1:
        return
    said = {
        "method": describe(parts.method),
        "base": type(parts.base.torch).__name__,
        "steps": parts.training.steps,
        "weights": {name: f"{tuple(shards.shape(x))} {x.dtype}" for name, x in weights.items()},
        "groups": {str(i): plain_options(group) for i, group in enumerate(groups)},
    }
    agree(said, shards.processes, "give mm.sparsify the same on every process, or the process_group= of those that do")
    copies = [x for x in weights.values() if not is_sharded(shards.whole(x))]
    if not shards.processes.same([fingerprint(x) for x in copies]):
        for x in copies:  # as DistributedDataParallel does, which may come later: latents are made of these
            shards.processes.copy_first(x)


def agree_on_state(parts: Parts, *, latents: bool = False) -> None:
    """Raise unless all processes are at the same step, with the same masks and latents where each holds them."""
    weights, shards, training = parts.weights, parts.weights.shards, parts.training
    if shards.processes.count == 1:
        return
    said: dict[str, Any] = {
        "step": training.step,
        "skipped steps": training.skipped,
        "finalized": training.finalized,
    }
    for name, x in weights.items():
        mask = weights.mask_of(x)
        whole = not is_sharded(shards.whole(x))
        if whole and mask is not None:
            said[f"the mask of {name!r}"] = fingerprint(mask)
        if whole and latents:
            for key, latent in (weights.latents_of(x) or {"": x}).items():
                said[f"{key or 'the value'} of {name!r}"] = fingerprint(latent)
    agree(said, shards.processes, "begin, load and step on every process alike, and let DistributedDataParallel "
          "average the gradients")  # fmt: skip
