"""FSDP leaves whole tensors in a model after a forward pass; whoever looks for its parameters puts the parts back."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from mirrormask.checks import few

__all__ = ["check_whole", "reshard"]


def reshard(model: nn.Module) -> None:
    """Put the DTensors back in the place of what ``fully_shard`` gathers for a forward pass.

    The root keeps it after one without gradients, and all do under ``reshard_after_forward=False``: ordinary tensors
    that stand where the parameters were. What is written into them is lost, and the optimizer does not hold them. Of
    other models nothing changes.

    Example:
        >>> reshard(nn.Linear(2, 1))
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def check_whole(model: nn.Module, verb: str) -> None:
    """Refuse a model of which other processes hold parts.

    Args:
        model: any module.
        verb: what is to be done with it.

    Raises:
        TypeError: it is no module.
        ValueError: it names the parameters.

    Example:
        >>> check_whole(nn.Linear(2, 1), "compile")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}, not an nn.Module")
    reshard(model)
    spread = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
    if spread:
        raise ValueError(
            f"{few(spread)}: sharded over processes; {verb} a model that one process holds whole: "
            "plain.load_state_dict(whole), with whole = torch.distributed.checkpoint.state_dict.get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), called on every process"
        )
