"""What every geometry answers: how a weight ``x = φ(θ)`` starts, how its gradient reaches θ, how θ becomes x again."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from mirrormask.masked import keep_only
from mirrormask.progress import Clock

__all__ = ["Geometry", "Held", "Latents", "mean", "steps_like"]

#: How many elements a sum in float64 converts at a time.
CHUNK = 1 << 14

#: The latents of several weights: latent name -> one tensor a weight, in one fixed order.
Latents = Mapping[str, list[Tensor]]

G = TypeVar("G", bound="Geometry")


class Held:
    """How many elements of a weight there are, and sums over them: of all that is here, where nothing is elsewhere."""

    def size(self, x: Tensor) -> int:
        """The number of elements of the weight of which ``x`` (or its latent) is what is here."""
        return x.numel()

    def shape(self, x: Tensor) -> torch.Size:
        """The shape of all of the weight."""
        return x.shape

    def sums(self, parts: list[Tensor]) -> list[Tensor]:
        """From sums over what is here, one number a weight, those over all of it."""
        return parts

    def cut(self, x: Tensor, full: Tensor) -> Tensor:
        """What belongs to ``x`` of a tensor of the whole weight's shape."""
        return full

    def first(self, x: Tensor, count: int) -> Tensor:
        """The first elements of the weight in row-major order, in float64, in CPU memory."""
        return x.detach().reshape(-1)[:count].double().cpu()


class Geometry(ABC):
    """How a weight moves: the map ``x = φ(θ)`` and its pullback ``∂θ = (Dφ)ᵀ ∂x``.

    A geometry is a frozen configuration; the tensors belong to the optimizer, which calls these functions on whole
    lists of them (``torch._foreach``), never inside the autograd graph.
    """

    #: The names of the latents, in the order in which the base optimizer holds them; empty if θ is x itself.
    latents: ClassVar[tuple[str, ...]] = ()
    #: What the map needs beside the latents and no optimizer trains, kept with them: one number a weight tensor, or,
    #: of a geometry that aims, tensors of the weight's shape.
    constants: ClassVar[tuple[str, ...]] = ()
    #: The latents on which the base optimizer's ``weight_decay`` acts as on an ordinary weight.
    weight_decayed: ClassVar[tuple[str, ...]] = ()
    #: The latents on which a method's step after the optimizer's acts; None for all of them.
    stepped: ClassVar[tuple[str, ...] | None] = None
    #: True if latents that ``prune`` left have no gradient, whatever that of x is, and so stay at x = 0 by themselves
    #: under an elementwise optimizer. One that does not say so has its zeros written at every step.
    keeps_zeros: ClassVar[bool] = False
    #: The latents that are set to zero at every step where the mask is; empty to set x itself.
    masked: ClassVar[tuple[str, ...]] = ()
    #: Whether a decay may join the gradient of the latents (``coupled=True``).
    couples: ClassVar[bool] = True
    #: True if the geometry makes zeros of its own: ``importance`` says which, ``reach`` how many.
    sparsifies: ClassVar[bool] = False
    #: True if the weights are drawn to a target that lies in the constants: ``wish`` ranks what shall live of it, and
    #: ``aim`` sets it, after the steps at which ``refresh_due``.
    aims: ClassVar[bool] = False
    #: The latents that are one number for a whole tensor.
    shared: ClassVar[tuple[str, ...]] = ()
    #: Whether all sums over a tensor go through ``held``, so that several processes may each hold a part of it. Of a
    #: class itself: one derived from it, which may sum in another way, says so anew.
    shards: ClassVar[bool] = False

    #: How far x may be from φ(θ) where nobody has changed it, in units of float32's or float64's last place.
    rounding: ClassVar[float] = 64.0

    #: What is here of the weights that it is called for; :meth:`over` sets another.
    held: ClassVar[Held] = Held()

    def over(self: G, held: Held) -> G:
        """This geometry, called for weights of which other processes hold parts too."""
        own = copy.copy(self)
        object.__setattr__(own, "held", held)  # no field: a configuration is the same wherever weights lie
        return own

    @abstractmethod
    def init(self, x: Tensor) -> dict[str, Tensor]:
        """The latents of one weight, new tensors with ``φ(θ) = x`` (to 1 ulp); ``{}`` if θ is x itself."""

    @abstractmethod
    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """The gradients of the latents from the gradients of x: new tensors; ``grads`` stay as they are."""

    @abstractmethod
    def push(self, x: list[Tensor], latents: Latents) -> None:
        """Write ``x = φ(θ)`` in place."""

    def shrink(self, latents: Latents, keep: float) -> None:
        """The decay's part of a step, in place: every latent times ``keep = 1 - 2 lr α``."""
        for name in self.latents:
            torch._foreach_mul_(latents[name], keep)

    def before_step(self, x: list[Tensor], latents: Latents) -> list[Tensor]:
        """What ``after_step`` needs of the latents before the step; x, which is written anew, may hold it."""
        return []

    def after_step(self, latents: Latents, before: list[Tensor]) -> None:
        """What follows the base optimizer's step, in place; ``before`` is what ``before_step`` returned."""
        return

    def rate(self, x: Tensor, latents: Mapping[str, Tensor], *, adaptive: bool) -> float:
        """The factor on the base learning rate with which this weight's latents train.

        Args:
            x: the weight at the start.
            latents: its latents at the start.
            adaptive: True where the base optimizer's step does not grow with the gradient (Adam and its kin).
        """
        return 1.0

    def at(self, clock: Clock) -> Geometry:
        """This geometry at one moment of training: for maps that change with it (an annealed temperature)."""
        return self

    def prune(self, latents: Mapping[str, Tensor], mask: Tensor) -> None:
        """Bring the latents of the weights that ``mask`` (True = lives) removes to a point with x = 0, in place."""
        for latent in latents.values():
            keep_only(latent, mask)

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """Give the weights in ``new`` latents that can move again, in place.

        Args:
            latents: of one weight tensor.
            alive: bool, the weights that lived before.
            new: bool, those that come back.
            values: what x shall be there, of x's shape; None for 0 (or as near to it as a weight can still move).
        """
        return

    def adopt(self, x: Tensor, latents: Mapping[str, Tensor], changed: Tensor) -> None:
        """Somebody has written into the weight: give it, where ``changed``, latents with ``φ(θ) = x``, in place.

        What the latents hold beside x (the scale ``a``, a threshold, a temperature) stays.
        """
        fresh = self.init(x)
        for name in self.latents:
            latents[name].copy_(torch.where(changed, fresh[name].to(latents[name].dtype), latents[name]))

    def scale(self, latents: Mapping[str, Tensor]) -> Tensor | None:
        """The scale ``a`` of the Bregman potential, a value a weight; None where the geometry has none."""
        return None

    def importance(self, latents: Mapping[str, Tensor]) -> Tensor | None:
        """What ranks the weights, above 0 exactly where x lives; None where the mask's own score does."""
        return None

    def wish(self, latents: Mapping[str, Tensor], moment: Tensor | None) -> Tensor:
        """Of a geometry that aims: a new tensor that ranks the weights; it replaces a mask's score "magnitude".

        Args:
            latents: of one weight tensor.
            moment: the second moment of the gradient that the base optimizer keeps; None where it keeps none.
        """
        raise TypeError(f"{type(self).__name__} has no target")

    def aim(self, latents: Mapping[str, Tensor], living: Tensor, clock: Clock) -> None:
        """Of a geometry that aims: a new target whose weights in ``living`` live, in place."""
        return

    def reach(self, latents: Mapping[str, Tensor], shift: float) -> None:
        """Lower the importance of every weight of one tensor by ``shift``, in place."""
        return

    def settle(self, x: Tensor, latents: Mapping[str, Tensor]) -> None:
        """The mask is final: turn the latents, in place, into such that make no further zeros, with x as it is."""
        return

    def refresh_due(self, clock: Clock) -> bool:
        """Whether the latents are to be chosen anew, for the same x, after the step that ends at ``clock``."""
        return False

    def refresh(self, x: Tensor, latents: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """Choose the latents of one weight tensor anew, in place, with the same x."""
        return


def steps_like(geometry: Geometry, kind: type[Geometry]) -> bool:
    """Whether ``geometry`` is a ``kind`` that changes nothing of its step, so that the kind's fast path may serve."""
    own = type(geometry)
    parts = ("pullback", "push", "shrink", "before_step", "after_step")
    return issubclass(own, kind) and all(getattr(own, part) is getattr(kind, part) for part in parts)


def mean(function: Callable[[Tensor], Tensor], x: Tensor, held: Held = Geometry.held) -> float:
    """The mean of an elementwise function over a tensor, in float64, a chunk at a time: no copy of x is made.

    Args:
        function: of a tensor.
        x: at least one element, of all that ``held`` adds up.
        held: knows what is elsewhere.

    Example:
        >>> mean(torch.square, torch.tensor([1.0, 3.0]))
        5.0
    """
    flat = (x if x.is_contiguous() or x.dim() < 3 else x.movedim(1, -1)).reshape(-1)  # channels_last: a view too
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in torch.split(flat, CHUNK):
        total += function(part.double()).sum()  # a list of sums would lie in what chunks leave, and pin it
    return float(held.sums([total])[0]) / held.size(x)
