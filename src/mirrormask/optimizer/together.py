"""What processes that train one model agree on: when they begin, when they load, and whenever a mask changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.methods.description import describe
from mirrormask.optimizer.agreement import agree, fingerprint
from mirrormask.optimizer.base_groups import Group, plain_options
from mirrormask.optimizer.parts import Parts
from mirrormask.optimizer.processes import Processes
from mirrormask.optimizer.shards import is_sharded

__all__ = ["agree_on_state", "begin_together", "copy_model", "mean_of_all"]


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


def copy_model(model: nn.Module, processes: Processes) -> None:
    """Biases and statistics of the first too: what is measured of weights is measured on the network that they are in.

    DistributedDataParallel does so when it is built, which may come later.
    """
    if processes.count == 1:
        return
    every = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    tensors = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in every]
    if not processes.same([fingerprint(tensor) for tensor in tensors]):
        for tensor in tensors:
            processes.copy_first(tensor)


def mean_of_all(measured: Callable[[], Sequence[Tensor]], processes: Processes) -> list[Tensor]:
    """The mean over the processes of what each of them measures on its own data.

    Raises:
        RuntimeError: another process could not measure; that one has the reason.
    """
    failed = torch.tensor(1)
    try:
        with torch.enable_grad():
            scores = measured()
        failed = torch.tensor(0)
    finally:
        others = bool(processes.max(failed))
    if others:
        raise RuntimeError("another process could not measure its scores, and says why; give batches= to all of them")
    if processes.count == 1:
        return list(scores)
    return [processes.sum(score).div_(processes.count) for score in scores]


def agree_on_state(parts: Parts, groups: Sequence[Group], *, latents: bool = False) -> None:
    """Raise unless all processes are at the same step, with the same masks and latents where each holds them."""
    weights, shards, training = parts.weights, parts.weights.shards, parts.training
    if shards.processes.count == 1:
        return
    said: dict[str, Any] = {
        "step": training.step,
        "skipped steps": training.skipped,
        "finalized": training.finalized,
        # A scheduler that reads its own process's loss, or steps on the first one alone, sets rates apart.
        "groups": {str(i): {**plain_options(group), "lr": float(group["lr"])} for i, group in enumerate(groups)},
        "decay": {key: f"{value:.6g}" for key, value in training.decay.state.items()},
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
