"""The weights that an optimizer makes sparse: their names, parameters and state, and how one is made of the other."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mirrormask.checks import few
from mirrormask.flats import keep_only_each
from mirrormask.geometry import Geometry
from mirrormask.optimizer.shards import Shards
from mirrormask.progress import Clock

__all__ = ["KEPT", "SNAP", "STATE_SNAP", "SparseWeights", "Stateful", "bare_name", "bare_names"]

#: Latents below this are set to zero, so that no product of two of them, and no weight, is a denormal number (which
#: a processor computes up to a hundred times slower): x = m w stays at or above 2**-126, the least normal float32.
SNAP = 2.0**-63
#: State of the base optimizer (momentum, say) below this is set to zero: it could not move a latent any more.
STATE_SNAP = 2.0**-100
#: The prefix of what rounds go back to in a weight's state.
KEPT = "start."
#: What tools put into a model's names: DistributedDataParallel and AveragedModel, torch.compile, FSDP, checkpointing of
#: activations.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Stateful(Protocol):
    """What has torch's ``state``: parameter -> its tensors and numbers by name."""

    state: Any


class SparseWeights(Mapping[str, nn.Parameter]):
    """name -> parameter of the weights that may become sparse, with what is kept of each.

    Of a DTensor it is what this process holds, an ordinary tensor on the same memory, and so is all that is kept.

    The state of a weight is a dict by name: its latents and constants, ``rate`` (the factor on the learning rate of its
    latents), ``mask`` once there is one (bool, True where the weight lives), ``score`` where it was measured before the
    first step, ``signs`` (:func:`pack_signs` of the start).

    Args:
        named: the weights.
        geometry: how they move.
        holder: whose ``state`` they are in. It is looked up at every use: torch exchanges it.
        shards: what is here of the parameters; None where all of each is.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], geometry: Geometry, holder: Stateful, shards: Shards | None = None
    ) -> None:
        self.shards = shards or Shards([])
        self._named: dict[str, Any] = {name: self.shards.local(p) for name, p in named.items()}
        self._holder = holder
        self.geometry = geometry

    def __getitem__(self, name: str) -> nn.Parameter:
        found: nn.Parameter = self._named[name]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def values(self) -> ValuesView[nn.Parameter]:
        """As of a dict: a Mapping's own asks for each by name, several times a step."""
        return self._named.values()

    def items(self) -> ItemsView[str, nn.Parameter]:
        """As of a dict."""
        return self._named.items()

    # -- what is kept of a weight --------------------------------------------------------------------------------

    def state(self, x: Tensor) -> dict[str, Any]:
        """What is kept of a weight."""
        found: dict[str, Any] = self._holder.state[x]
        return found

    def kept(self) -> list[Any]:
        """All that is kept of any weight, in one list, to see whether it is the same as before."""
        return [value for state in self._holder.state.values() for value in state.values()]

    def holds(self, p: Tensor) -> bool:
        """Whether a parameter of the model is one of these."""
        return "rate" in self._holder.state.get(p, {})

    def own_keys(self) -> frozenset[str]:
        """Under what names something of ours may be kept of a weight, beside what starts with a prefix of rounds."""
        return frozenset((*self.geometry.latents, *self.geometry.constants, "rate", "signs", "mask", "score"))

    def foreign(self, p: Tensor) -> dict[str, Any]:
        """What others keep in the state of a parameter, by name: the slow weights of a Lookahead around us, say."""
        own, state = self.own_keys(), self._holder.state.get(p, {})
        return {key: value for key, value in state.items() if key not in own and not key.startswith(KEPT)}

    def put_foreign(self, p: Tensor, values: Mapping[str, Any]) -> None:
        """Put ``values`` in the place of :meth:`foreign`."""
        before = self.foreign(p)
        if before or values:
            state = self._holder.state[p]
            for key in before:
                del state[key]
            state.update(values)

    def check_kept(self) -> None:
        """Raise where somebody has cleared or replaced what is kept of a weight.

        Raises:
            RuntimeError: it names the weights.
        """
        state = self._holder.state
        lost = [name for name, x in self.items() if "rate" not in state.get(x, ())]
        if lost:
            raise RuntimeError(
                f"the state of {few(lost)} was cleared or replaced: latents and masks are in it, and the training is "
                "lost with them; to forget the momentum of the base optimizer clear optimizer.base.state, to begin "
                "anew call mm.sparsify on a new optimizer, to go back load a state_dict()"
            )

    def geometry_of(self, x: Sequence[Tensor], clock: Clock | None = None) -> Geometry:
        """The geometry, for functions that sum over these weights, which may be on several processes."""
        own = self.geometry if clock is None else self.geometry.at(clock)
        return own.over(self.shards.held(x)) if self.shards.spread else own

    def latents_of(self, x: Tensor) -> dict[str, Tensor]:
        """The latents and constants of one weight by name; ``{}`` where the geometry has none."""
        state = self.state(x)
        return {name: state[name] for name in (*self.geometry.latents, *self.geometry.constants)}

    def latents(self, weights: Iterable[Tensor]) -> dict[str, list[Tensor]]:
        """The latents and constants of several weights, each name with one tensor a weight."""
        states = [self.state(x) for x in weights]
        return {name: [s[name] for s in states] for name in (*self.geometry.latents, *self.geometry.constants)}

    def trained(self, p: Tensor) -> list[tuple[str, Tensor]]:
        """What the base optimizer trains for a parameter of the model: its latents by name, or ``""`` and itself."""
        names = self.geometry.latents if self.holds(p) else ()
        return [(name, self.state(p)[name]) for name in names] or [("", p)]

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of a weight; None before it has one."""
        mask: Tensor | None = self.state(x).get("mask")
        return mask

    @property
    def masks(self) -> dict[str, Tensor]:
        """name -> bool tensor, True where the weight lives."""
        found = {name: self.mask_of(x) for name, x in self.items()}
        return {name: torch.ones_like(self[name], dtype=torch.bool) if m is None else m for name, m in found.items()}

    @property
    def masked(self) -> bool:
        """Whether there are masks: all weights have one, or none has."""
        return any(self.mask_of(x) is not None for x in self.values())

    # -- from latents to weights ---------------------------------------------------------------------------------

    def push(self, weights: list[nn.Parameter], clock: Clock) -> None:
        """Write ``x = φ(θ)`` with φ as it is at ``clock``; masked latents are zeros first."""
        if not weights or not self.geometry.latents:
            return
        for name in self.geometry.masked:
            self.hold_zeros((x, self.state(x)[name]) for x in weights)
        self.geometry.at(clock).push(list[Tensor](weights), self.latents(weights))

    def push_all(self, clock: Clock, *, zeros_stay: bool) -> None:
        """Write all weights anew from their latents and masks."""
        self.push(list(self.values()), clock)
        self.apply_masks(self.values(), zeros_stay=zeros_stay)

    def push_unstepped(self, before: Clock, *, zeros_stay: bool) -> None:
        """After the step that began at ``before``: write those without a gradient anew, if the map has changed."""
        if self.geometry.at(before) != self.geometry.at(before.next):
            others = [x for x in self.values() if x.grad is None]
            self.push(others, before.next)
            self.apply_masks(others, zeros_stay=zeros_stay)

    def apply_masks(self, weights: Iterable[Tensor], *, zeros_stay: bool) -> None:
        """Set to zero what the masks remove.

        Args:
            weights: of these.
            zeros_stay: whether the base optimizer leaves an element that is zero with all its state where it is, so
                that there may be nothing to do.
        """
        if self.geometry.masked or (self.geometry.keeps_zeros and zeros_stay):
            return
        self.hold_zeros((x, x) for x in weights)

    def hold_zeros(self, tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set to zero, of each weight's tensor here, what the weight's mask removes.

        By choice and not by a product: zero times NaN is NaN, and -0.0, which a negative weight would leave, is a value
        that files must store.
        """
        state = self._holder.state
        masked = [(held, mask) for x, held in tensors if (mask := state[x].get("mask")) is not None]
        keep_only_each([held for held, _ in masked], [mask for _, mask in masked])


def bare_name(name: str) -> str:
    """The name of a parameter without what wrappers of the model put into it.

    Example:
        >>> bare_name("module.layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Each name -> :func:`bare_name`; all as they are, where two would become one: a user may call a layer ``module``.

    Example:
        >>> bare_names(["module.fc.weight", "module.head.weight"])
        {'module.fc.weight': 'fc.weight', 'module.head.weight': 'head.weight'}
        >>> bare_names(["module.fc.weight", "fc.weight"])
        {'module.fc.weight': 'module.fc.weight', 'fc.weight': 'fc.weight'}
    """
    bare = {name: bare_name(name) for name in names}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in bare}
