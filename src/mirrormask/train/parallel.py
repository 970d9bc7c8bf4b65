"""Several processes that train one run: who started them, how the model lies on them, and what if one is lost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["LostProcess", "launched", "lost", "shard", "shared", "too_few", "whole"]

#: Blocks with fewer parameters than this are sharded together with what is around them: messages have a fixed cost.
BLOCK = 1_000_000
#: How the backends say that another process went away; only gloo's errors have no class of their own.
GONE = ("gloo", "connection closed", "connection reset", "broken pipe", "connection refused", "nccl", "socket")


class LostProcess(ConnectionError):
    """Another process of this run has ended in its middle; the run can go on from its last checkpoint."""


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher says that there are; 1 without one.

    Example:
        >>> launched({"WORLD_SIZE": "4"}), launched({})
        (4, 1)
    """
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    found = [environment[name] for name in names if environment.get(name, "").isdecimal()]
    return max(int(found[0]), 1) if found else 1


def too_few(there: int, environment: Mapping[str, str] = os.environ) -> str:
    """What to say where a launcher was asked for more processes than there are; empty where it was not.

    Args:
        there: how many there are.
        environment: variables of this process.

    Example:
        >>> too_few(1, {"WORLD_SIZE": "1"})
        ''
        >>> too_few(1, {"SLURM_STEP_NUM_TASKS": "4"})[:37]
        'srun started 4 tasks, and each of the'
    """
    remedy = "start them with `torchrun --nproc-per-node N -m mirrormask.cli train ...`"
    asked = launched(environment)
    if asked > there:
        return f"the launcher started {asked} processes and this run has {there} of them; {remedy}"
    known = any(name in environment for name in ("WORLD_SIZE", "LOCAL_RANK"))
    if there > 1 or known:
        return ""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdecimal() and int(tasks) > 1:
        return f"srun started {tasks} tasks, and each of them is a run by itself; {remedy}, one on each node"
    # This is all that is left in one that `accelerate launch --cpu --num_processes 2` has started.
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        return f"accelerate launch was asked for several processes and started one (on CPUs it needs MPI); {remedy}"
    return ""


def shared(make: Any) -> Any:
    """What ``make()`` returns on the first process, on all of them; what it raises is raised by all.

    Args:
        make: called by the first process alone.
    """
    if not _several():
        return make()
    held: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            held[0] = make()
        except Exception as error:
            held[1] = error
    dist.broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise held[1]
    return held[0]


def shard(model: nn.Module) -> None:
    """Shard the model over all processes with FSDP2: blocks of a ``Sequential`` or ``ModuleList``, then the rest.

    A block with fewer than :data:`BLOCK` parameters, or with one that is used outside of it too, goes with the rest.
    """
    from torch.distributed.fsdp import fully_shard

    count: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            count[p] = count.get(p, 0) + 1
    for block in _blocks(model):
        if all(count[p] == 1 for p in block.parameters()):
            fully_shard(block)
    fully_shard(model)


def _blocks(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        # What a container holds is called; other children may be there for their weights only.
        called = isinstance(module, (nn.Sequential, nn.ModuleList)) and not isinstance(child, nn.ModuleList)
        if called and sum(p.numel() for p in child.parameters()) >= BLOCK:
            found.append(child)
        else:
            found += _blocks(child)
    return found


@torch.no_grad()
def whole(value: Any, *, keep: bool) -> Any:
    """A tree with every DTensor as the whole tensor, on the CPU; every process must call this.

    Args:
        value: containers, tensors and plain values.
        keep: whether this process wants them; one that does not gets None for each DTensor.
    """
    if isinstance(value, Tensor):
        if not hasattr(value, "full_tensor"):
            return value
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: whole(item, keep=keep) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(whole(item, keep=keep) for item in value)
    return value


def lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone away."""
    if not _several() or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    said = str(error).lower()
    return any(word in said for word in GONE)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
