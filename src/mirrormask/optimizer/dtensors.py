"""The part of a DTensor that this process holds; imported only where there are any, since torch takes long for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

__all__ = ["Part"]


@dataclass(eq=False)
class Part:
    """One DTensor's part.

    Attributes:
        whole: the DTensor, as the model holds it.
        local: the same memory as an ordinary tensor, which stands for it in all arithmetic.
        places: along each dimension the indices that are here; None for all of them.
    """

    whole: DTensor
    local: Tensor
    places: list[Tensor | None]

    @classmethod
    def of(cls, whole: DTensor) -> Part:
        """This process's part of a parameter."""
        return cls(whole, whole._local_tensor.detach().requires_grad_(whole.requires_grad), _places(whole))

    @property
    def key(self) -> int:
        """A number that tells the parts of a parameter apart, in 62 bits."""
        return hash(tuple(-1 if own is None else tuple(own.tolist()) for own in self.places)) % 2**62 + 1

    def refresh(self) -> None:
        """Look where the memory is: FSDP moves it when it begins, and when a model is loaded or converted."""
        now = self.whole._local_tensor
        if now.data_ptr() != self.local.data_ptr() or now.shape != self.local.shape:
            self.local.data = now.detach()

    def index(self, at: Tensor) -> Tensor:
        """From places in the local tensor's row-major order to those in the whole one's."""
        total, rest, stride = torch.zeros_like(at), at, 1
        for size, own, places in zip(
            reversed(self.whole.shape), reversed(self.local.shape), reversed(self.places), strict=True
        ):
            along = rest % max(own, 1)
            total += (along if places is None else places.to(at.device)[along]) * stride
            rest, stride = rest // max(own, 1), stride * size
        return total

    def cut(self, full: Tensor) -> Tensor:
        """This process's part of a tensor of the whole one's shape."""
        for dim, places in enumerate(self.places):
            if places is not None:
                full = full.index_select(dim, places.to(full.device))
        return full

    def wrap(self, value: Tensor) -> Tensor:
        """A tensor of the local one's shape as a DTensor that lies as this one does."""
        whole = self.whole
        return DTensor.from_local(
            value.detach(), whole.device_mesh, whole.placements, run_check=False, shape=whole.shape,
            stride=whole.stride(),
        )  # fmt: skip

    def unwrap(self, value: Tensor) -> Tensor:
        """What belongs here of a tensor that is a DTensor, or whole on every process."""
        if not isinstance(value, DTensor):
            return self.cut(value) if value.shape == self.whole.shape and value.dim() else value
        if value.shape != self.whole.shape:
            return value.full_tensor()
        if value.device_mesh != self.whole.device_mesh:
            return self.cut(value.full_tensor())
        if value.placements != self.whole.placements:
            value = value.redistribute(placements=self.whole.placements)
        return value._local_tensor

    def take_gradient(self) -> None:
        """Give the local tensor its part of the gradient."""
        grad = self.whole.grad
        if isinstance(grad, DTensor):
            if grad.placements != self.whole.placements:
                grad = grad.redistribute(placements=self.whole.placements)
            grad = grad._local_tensor
        self.local.grad = grad


def _places(p: DTensor) -> list[Tensor | None]:
    """Along each dimension the indices that this process holds, in order; None for all of them."""
    found: list[Tensor | None] = []
    for dim, size in enumerate(p.shape):
        along = [_along(placement, dim, p.dim()) for placement in p.placements]
        if all(placement.is_replicate() for placement in along):
            found.append(None)
            continue
        indices = distribute_tensor(torch.arange(size), p.device_mesh, along, src_data_rank=None)
        found.append(indices._local_tensor.cpu())
    sizes = [size if own is None else len(own) for size, own in zip(p.shape, found, strict=True)]
    if list(p._local_tensor.shape) != sizes:
        raise ValueError(
            f"a DTensor of shape {tuple(p.shape)} and placements {p.placements} holds {tuple(p._local_tensor.shape)} "
            f"here, where {tuple(sizes)} were expected; shard it as distribute_tensor does"
        )
    return found


def _along(placement: Any, dim: int, dims: int) -> Any:
    """How a vector of one dimension's indices lies where the tensor lies as ``placement`` says."""
    at = getattr(placement, "dim", None)
    if at is None or at % dims != dim:
        return Replicate()
    if type(placement) is Shard:
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)
