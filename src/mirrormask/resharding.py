"""FSDP leaves whole tensors in a model after a forward pass; whoever looks for its parameters puts the parts back."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

__all__ = ["reshard"]


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
