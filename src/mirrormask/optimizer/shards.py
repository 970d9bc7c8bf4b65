"""What this process holds of each parameter, and what all processes that train it together hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mirrormask.geometry.base import Held
from mirrormask.optimizer.processes import Processes

if TYPE_CHECKING:
    from mirrormask.optimizer.dtensors import Part

__all__ = ["Shards", "Versions", "is_sharded", "shard_of"]

#: Of each parameter what changes with every writer, and where its memory is.
Versions = tuple[list[object], list[int]]


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor: ``fully_shard`` and tensor parallelism make such."""
    return _is_dtensor(_class_of(p))


@functools.lru_cache(1024)
def _is_dtensor(kind: Hashable) -> bool:
    assert isinstance(kind, type)
    return any(known.__name__ == "DTensor" for known in kind.__mro__)


def _class_of(thing: Any) -> Any:
    return type(thing)  # mypy does not know that a class can be hashed whose instances cannot


def shard_of(p: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    own: Tensor = p._local_tensor if is_sharded(p) else p  # type: ignore[attr-defined]
    return own


class Shards:
    """Parameters, as far as they are here; without distribution they are here, and nothing is added up.

    A DTensor is stood for by an ordinary tensor on the same memory, :meth:`local`: all arithmetic, all latents, masks
    and state of the base optimizer are of that. Any other parameter stands for itself.

    Args:
        parameters: all that are trained.
        processes: those that train them together. They all call what adds up, in one order; None to add up nothing.

    Raises:
        ValueError: a DTensor is of partial sums, or the processes together do not hold one whole.
    """

    def __init__(self, parameters: Iterable[Tensor], processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self._together = processes is not None
        self._parts: dict[int, Part] = {}  # by the DTensor's id and by its local tensor's
        self._counted: dict[int, bool] = {}
        self.add(parameters)

    def __getstate__(self) -> dict[str, Any]:
        if self._parts:
            raise TypeError(
                "an optimizer of sharded parameters cannot be copied or pickled; save its state_dict() with "
                "torch.distributed.checkpoint"
            )
        return self.__dict__

    def add(self, parameters: Iterable[Tensor]) -> None:
        """More parameters are trained."""
        new = []
        for p in parameters:
            if is_sharded(p) and id(p) not in self._parts:
                from mirrormask.optimizer.dtensors import Part

                part = Part.of(p)  # type: ignore[arg-type]
                self._parts[id(p)] = self._parts[id(part.local)] = part
                new.append(part)
        if new and self._together and self.processes.count > 1:
            self._divide(new)

    def _divide(self, new: Sequence[Part]) -> None:
        """Who counts what: of the processes that hold the same part of a parameter, the first."""
        keys = torch.tensor([part.key for part in new])
        table = torch.zeros((self.processes.count, len(new)), dtype=torch.int64)
        table[self.processes.rank] = keys
        first = (self.processes.sum(table) == keys).int().argmax(0)  # of equal ones argmax gives the first
        for part, rank in zip(new, first.tolist(), strict=True):
            self._counted[id(part.local)] = rank == self.processes.rank
        counts = [part.local.numel() * self._counted[id(part.local)] for part in new]
        found = self.processes.sum(torch.tensor(counts)).tolist()
        for part, count in zip(new, found, strict=True):
            if count != part.whole.numel():
                raise ValueError(
                    f"the {self.processes.count} processes together hold {count} of the {part.whole.numel()} elements "
                    f"of a parameter of shape {tuple(part.whole.shape)}; pass mm.sparsify the process_group= of those "
                    "that train this model together"
                )

    # -- one parameter -------------------------------------------------------------------------------------------

    @property
    def any(self) -> bool:
        """Whether there are DTensors."""
        return bool(self._parts)

    @property
    def spread(self) -> bool:
        """Whether there are DTensors on several processes, so that numbers of all have to be added up."""
        return bool(self._counted)

    def local(self, p: Tensor) -> Tensor:
        """What stands for a parameter of the model."""
        part = self._parts.get(id(p))
        return p if part is None else part.local

    def whole(self, x: Tensor) -> Tensor:
        """The parameter of the model that a local tensor stands for."""
        part = self._parts.get(id(x))
        return x if part is None else part.whole

    def shape(self, x: Tensor) -> torch.Size:
        """The shape of all of it."""
        return self.whole(x).shape

    def size(self, x: Tensor) -> int:
        """The number of all its elements."""
        return self.whole(x).numel()

    def counts(self, x: Tensor) -> bool:
        """Whether this process is the one that counts what it holds of x."""
        return self._counted.get(id(x), not self._counted or self.processes.rank == 0)

    def index(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """From places in x's row-major order to those in the whole parameter's."""
        part = self._parts.get(id(x))
        return (lambda at: at) if part is None else part.index

    def cut(self, x: Tensor, full: Tensor) -> Tensor:
        """What belongs to x of a tensor of the whole parameter's shape."""
        part = self._parts.get(id(x))
        return full if part is None else part.cut(full)

    def places(self, x: Tensor, dim: int) -> Tensor | None:
        """The indices along a dimension that are here; None for all of them."""
        part = self._parts.get(id(x))
        return None if part is None else part.places[dim]

    def versions(self, x: Collection[Tensor]) -> Versions:
        """As :meth:`version`, of each."""
        if not self._parts:
            return [own._version for own in x], [own.data_ptr() for own in x]
        both = [self.version(own) for own in x]
        return [version for version, _ in both], [place for _, place in both]

    def version(self, x: Tensor) -> tuple[object, int]:
        """It changes when somebody writes into the parameter, and tells where its memory is."""
        part = self._parts.get(id(x))
        if part is None:
            return x._version, x.data_ptr()
        held = part.whole._local_tensor
        return (part.whole._version, held._version), held.data_ptr()

    # -- to and from DTensors ------------------------------------------------------------------------------------

    def wrap(self, x: Tensor, value: Any) -> Any:
        """A tensor of x's shape as a DTensor that lies as the parameter does; anything else as it is."""
        part = self._parts.get(id(x))
        if part is None or not isinstance(value, Tensor) or value.shape != x.shape:
            return value
        return part.wrap(value)

    def unwrap(self, x: Tensor, value: Any) -> Any:
        """What :meth:`wrap` was given; of a whole tensor, or of one that lies otherwise, the part that belongs to x."""
        part = self._parts.get(id(x))
        if not isinstance(value, Tensor):
            return value
        if part is None:
            return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined,no-any-return]
        return part.unwrap(value)

    def gathered(self, x: Tensor, value: Tensor) -> Tensor:
        """All of a tensor of x's shape, on every process, each of which must ask; for what looks at a training."""
        wrapped = self.wrap(x, value)
        return wrapped.full_tensor() if is_sharded(wrapped) else wrapped  # type: ignore[no-any-return]

    def take_gradients(self) -> None:
        """Give every local tensor its part of the gradient, and look where its memory is."""
        for part in self._both():
            part.refresh()
            part.take_gradient()

    def drop_gradients(self) -> None:
        """They are the model's."""
        for part in self._both():
            part.local.grad = None

    def refresh(self) -> None:
        """Look where the memory of every parameter is."""
        for part in self._both():
            part.refresh()

    def _both(self) -> list[Part]:
        return list({id(part): part for part in self._parts.values()}.values())

    # -- over processes ------------------------------------------------------------------------------------------

    def sum(self, numbers: Sequence[float], x: Sequence[Tensor] | None = None) -> list[float]:
        """Each number summed in float64 over the processes.

        Args:
            numbers: one for each of ``x``, or any.
            x: the tensors that the numbers are of, so that what several processes hold is counted once; None where
                every process's number counts.
        """
        if not self.spread:
            return list(numbers)
        own = [n if x is None or self.counts(x[i]) else 0 for i, n in enumerate(numbers)]
        return self.processes.sum(torch.tensor(own, dtype=torch.float64)).tolist()  # type: ignore[no-any-return]

    def count(self, numbers: Sequence[int], x: Sequence[Tensor]) -> list[int]:
        """As :meth:`sum`, of integers."""
        if not self.spread:
            return list(numbers)
        own = [n * self.counts(t) for n, t in zip(numbers, x, strict=True)]
        return self.processes.sum(torch.tensor(own, dtype=torch.int64)).tolist()  # type: ignore[no-any-return]

    def rows(self, found: Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]) -> list[Tensor]:
        """Sums over some dimensions of weights, of all of each; one exchange.

        Args:
            found: a weight, the integers that came of summing what is here of it, and the dimensions summed over.
        """
        if not self.spread or not found:
            return [own for _, own, _ in found]
        wholes = []
        for x, own, dims in found:
            shape, left = self.shape(x), [d for d in range(x.dim()) if d not in dims]
            here = [self.places(x, d) for d in left]
            whole = torch.zeros([shape[d] for d in left], dtype=torch.int64)
            along = [torch.arange(shape[d]) if at is None else at for d, at in zip(left, here, strict=True)]
            if self.counts(x):
                whole[torch.meshgrid(*along, indexing="ij") if along else ...] = own.cpu()
            wholes.append(whole)
        flat = self.processes.sum(torch.cat([whole.view(-1) for whole in wholes]))
        parts = torch.split(flat, [whole.numel() for whole in wholes])
        return [part.view(whole.shape) for part, whole in zip(parts, wholes, strict=True)]

    def max(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number."""
        if not self.spread:
            return list(numbers)
        return self.processes.max(torch.tensor(list(numbers), dtype=torch.float64)).tolist()  # type: ignore[no-any-return]

    def all(self, holds: bool) -> bool:
        """Whether something holds on every process."""
        return self.max([not holds]) == [0] if self.spread else holds

    def held(self, x: Sequence[Tensor]) -> Held:
        """For a geometry that is called for these tensors."""
        return _HeldHere(self, x)


class _HeldHere(Held):
    """Adds up over the processes that hold parts of some tensors."""

    def __init__(self, shards: Shards, x: Sequence[Tensor]) -> None:
        self._shards, self._x = shards, list(x)

    def size(self, x: Tensor) -> int:
        (own,) = self._x
        return self._shards.size(own)

    def shape(self, x: Tensor) -> torch.Size:
        (own,) = self._x
        return self._shards.shape(own)

    def cut(self, x: Tensor, full: Tensor) -> Tensor:
        (own,) = self._x
        return self._shards.cut(own, full)

    def first(self, x: Tensor, count: int) -> Tensor:
        (own,) = self._x
        if not self._shards.spread:
            return super().first(x, count)
        there = self._shards.index(own)(torch.arange(x.numel()))
        chosen, found = there < count, torch.zeros(min(count, self._shards.size(own)), dtype=torch.float64)
        if self._shards.counts(own):
            found[there[chosen]] = x.detach().reshape(-1).cpu()[chosen].double()
        return self._shards.processes.sum(found)

    def sums(self, parts: list[Tensor]) -> list[Tensor]:
        if not parts or not self._shards.spread:  # under DDP each process holds all of it
            return parts
        own = [part if self._shards.counts(x) else torch.zeros_like(part)
               for part, x in zip(parts, self._x, strict=True)]  # fmt: skip
        together = self._shards.processes.sum(torch.stack([part.double() for part in own]))
        return [total.to(part.dtype) for total, part in zip(together.unbind(), parts, strict=True)]
