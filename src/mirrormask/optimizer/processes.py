"""The processes that train one model together: sums and maxima of small tensors over them, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes"]


class Processes:
    """A process group, or a process alone.

    Args:
        group: of ``torch.distributed``; None for all processes, where there are several.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise TypeError("an optimizer of a process_group= cannot be pickled; save its state_dict()")
        return self.__dict__

    @property
    def count(self) -> int:
        """How many there are."""
        there = dist.is_available() and dist.is_initialized()
        return dist.get_world_size(self._group) if there else 1

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return dist.get_rank(self._group) if self.count > 1 else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each; a new tensor, where ``tensor`` is."""
        return self._reduced(tensor, dist.ReduceOp.SUM) if self.count > 1 else tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over all processes; a new tensor, where ``tensor`` is."""
        return self._reduced(tensor, dist.ReduceOp.MAX) if self.count > 1 else tensor

    def mean(self, number: float) -> float:
        """The mean over all processes; where it is one number on all of them, that number to the last bit."""
        if self.count == 1:
            return number
        least, most = (-self.max(torch.tensor([-number, number], dtype=torch.float64)) * torch.tensor([1, -1])).tolist()
        if least == most:
            return number
        return float(self.sum(torch.tensor(number, dtype=torch.float64))) / self.count

    def same(self, numbers: Sequence[int]) -> bool:
        """Whether every process has these integers of 64 bits."""
        if self.count == 1 or not numbers:
            return True
        own = torch.tensor(numbers, dtype=torch.int64)
        most = self.max(torch.stack([own, ~own]))
        return bool((most[0] == ~most[1]).all())

    def copy_first(self, tensor: Tensor) -> None:
        """Write the first process's tensor into everyone's."""
        there = tensor.detach().to(self._device(tensor), memory_format=torch.contiguous_format, copy=True)
        dist.broadcast(there, group=self._group, group_src=0)
        tensor.copy_(there)

    def said(self, words: Any) -> list[Any]:
        """What each process says, in the order of ranks; for an error that names one of them."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, words, group=self._group)
        return found

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        there = tensor.detach().to(self._device(tensor), copy=True)
        dist.all_reduce(there, how, group=self._group)
        return there.to(tensor.device)

    def _device(self, tensor: Tensor) -> torch.device:
        """Where the group's backend exchanges a tensor: where it is, if it can."""
        backends = str(dist.get_backend_config(self._group))
        for device in (tensor.device, torch.device("cpu"), torch.accelerator.current_accelerator()):
            if device is not None and f"{device.type}:" in backends:
                return device
        return tensor.device
